"""transformers' PvtV2, as save_pretrained writes it, is read here: names, key and value apart, numerics. The logits are transformers' own
by their names alone: eps 1e-6 in every norm, where the official code has 1e-5 (docs/models.md)."""
import torch
import transformers

import formula
import pyramid

CONFIGS = {
    "pvt_v2_b0": {},
    "pvt_v2_b2_li": {"hidden_sizes": [64, 128, 320, 512], "depths": [3, 4, 6, 3], "linear_attention": True},
}


def main():
    torch.set_num_threads(2)
    transformers.utils.logging.disable_progress_bar()
    for variant, config in CONFIGS.items():
        torch.manual_seed(1)
        model = transformers.PvtV2ForImageClassification(transformers.PvtV2Config(num_labels=1000, **config)).eval()
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        formulas = {name: torch.from_numpy(array) for name, array in formula.weights(shapes, "transformers").items()}
        pictures = formula.image(2, 64, 96)
        for kind in ("their own random weights", "formula weights"):
            if kind == "formula weights":
                model.load_state_dict(formulas)
            with torch.inference_mode():
                theirs = model(torch.from_numpy(pictures)).logits.numpy()
            folder = pyramid.path(f"{variant}-{kind.split()[0]}")
            model.save_pretrained(folder)
            torch.save(model.state_dict(), folder + "/weights.pth")
            for file in ("model.safetensors", "weights.pth"):
                ours = pyramid.logits(f"{folder}/{file}", pictures)
                pyramid.compare(f"{variant}, {kind}, {file}", theirs, ours, 2e-5)
            ours = pyramid.logits(folder + "/model.safetensors", pictures, "--origin", "official")
            pyramid.compare(f"{variant}, {kind}, with --origin official", theirs, ours, 5e-4)
    pyramid.finish()


main()
