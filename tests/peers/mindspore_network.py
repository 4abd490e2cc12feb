"""MindCV's PVT v2 on MindSpore's CPU, for the scripts beside."""
import mindcv
import mindspore as ms

ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU")


def create(variant, classes=1000, file=""):
    """With MindCV's loader, if there is a file."""
    return mindcv.create_model(variant, num_classes=classes, checkpoint_path=file).set_train(False)


def load(network, file):
    """Strict; returns the names that the file or the network lacks. What our notes in the file are called doesn't count: MindSpore names
    them in a warning and goes on."""
    missing, unused = ms.load_param_into_net(network, ms.load_checkpoint(file), strict_load=True)
    return list(missing) + [name for name in unused if not name.startswith("pyramid.")]


def arrays(network):
    return {name: parameter.asnumpy() for name, parameter in network.parameters_dict().items()}


def logits(network, pictures):
    return network(ms.Tensor(pictures)).asnumpy()
