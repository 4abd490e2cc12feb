"""MindCV's PVT v2 on MindSpore's CPU, for the scripts beside."""
import mindcv
import mindspore as ms

ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU")


def create(variant, classes=1000):
    return mindcv.create_model(variant, num_classes=classes).set_train(False)


def load(network, file):
    """Strict: returns the names that the file or the network lacks; both must be none."""
    missing, unused = ms.load_param_into_net(network, ms.load_checkpoint(file), strict_load=True)
    return list(missing) + list(unused)


def arrays(network):
    return {name: parameter.asnumpy() for name, parameter in network.parameters_dict().items()}


def logits(network, pictures):
    return network(ms.Tensor(pictures)).asnumpy()
