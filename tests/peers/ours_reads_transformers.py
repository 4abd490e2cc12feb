"""transformers' PvtV2, as save_pretrained writes it, is read here: names, key and value apart, numerics. The logits are transformers'."""
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
            pyramid.compare(f"{variant}, {kind}, safetensors", theirs, pyramid.logits(folder + "/model.safetensors", pictures), 2e-5)
            torch.save(model.state_dict(), folder + "/pytorch_model.pth")
            pyramid.compare(f"{variant}, {kind}, PyTorch zip", theirs, pyramid.logits(folder + "/pytorch_model.pth", pictures), 2e-5)
    pyramid.finish()


main()
