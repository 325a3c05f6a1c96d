import importlib
import sys

import pytest
import torch
from torch import nn

from normpass import models
from normpass.demo import digits


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A current directory with a module of the user's, `mynets`, and a package, `zoo.small`."""
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "small.py").write_text("from torch import nn\nclass Net(nn.Linear):\n    pass\n")
    (tmp_path / "mynets.py").write_text(
        "from torch import nn\n"
        "def build():\n    import helper_of_mynets\n    return helper_of_mynets.make()\n"
        "def numbers():\n    return [1, 2]\n"
        "def sized(width):\n    return nn.Linear(width, 1)\n"
        "def broken():\n    raise RuntimeError('inside')\n"
        "class Holder:\n    make = staticmethod(build)\n"
        "made = nn.ReLU()\n"
        "constant = 3\n"
    )
    (tmp_path / "helper_of_mynets.py").write_text("from torch import nn\nmake = nn.ReLU\n")
    (tmp_path / "needy.py").write_text("import a_library_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    path = list(sys.path)
    yield tmp_path
    assert sys.path == path
    for name in ("mynets", "helper_of_mynets", "needy", "zoo", "zoo.small"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "spec, kind",
    [
        ("torchvision:resnet18", "ResNet"),
        ("torchvision:googlenet", "GoogLeNet"),  # warns unless its initialization is named
        ("torchvision:deeplabv3_resnet50", "DeepLabV3"),  # downloads its backbone unless told not to
        ("timm:resnet18", "ResNet"),
        ("timm:resnet18.a1_in1k", "ResNet"),
        ("torch.nn:Identity", "Identity"),
    ],
)
def test_load_libraries(spec, kind):
    model = models.load(spec)
    assert isinstance(model, nn.Module)
    assert type(model).__name__ == kind


@pytest.mark.parametrize("spec, kind", [("mynets:build", nn.ReLU), ("mynets:Holder.make", nn.ReLU)])
def test_load_from_the_current_directory(workspace, spec, kind):
    assert isinstance(models.load(spec), kind)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("resnet50", "`resnet50` is not a model: write `torchvision:NAME`"),
        (":resnet50", "is not a model"),
        ("timm:", "is not a model"),
        ("torchvision:resnet5", "torchvision has no model `resnet5`; did you mean `torchvision:resnet50`"),
        ("torchvision:zzzzzz", "`torchvision.models.list_models()` lists them"),
        ("timm:resnet5O", "timm has no model `resnet5O`; did you mean `timm:resnet50`"),
        ("timm:hf_hub:somebody/net", "`timm.list_models()` lists them"),
        ("timm:resnet18.no_such_tag", "leave out what follows the dot"),
        ("nowhere_at_all:build", "no module `nowhere_at_all`"),
        ("mynets.deeper:build", "no module `mynets.deeper`"),
        (".mynets:build", "write `torchvision:NAME`"),
        ("mynets:biuld", "module `mynets` has no `biuld`; did you mean `mynets:build`?"),
        ("mynets:zzzzzz", "has no `zzzzzz`; name a function or class that it defines"),
        ("mynets:constant", "is a int: name a function or class"),
        ("mynets:sized", "missing a required argument: 'width'; name a function that needs none"),
        ("mynets:made", "`mynets:made` is a ReLU already: name a function that returns it"),
        ("mynets:numbers", "returned a list: return a torch.nn.Module"),
        ("zoo.small:Net", "missing a required argument: 'in_features'"),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(workspace, spec, message):
    with pytest.raises(models.ModelSpecError) as caught:
        models.load(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_errors_inside_the_users_code_have_their_place(workspace):
    with pytest.raises(models.ModelSpecError, match=r"`mynets:broken` raises RuntimeError: inside \(.*mynets.py:10\)"):
        models.load("mynets:broken")
    with pytest.raises(models.ModelSpecError, match=r"raises ModuleNotFoundError: .*nobody_has.* \(.*needy.py:1\)"):
        models.load("needy:build")


def test_a_missing_library_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(models.ModelSpecError, match=r'pip install "normpass\[nets\]"'):
        models.load("timm:resnet18")


@pytest.mark.parametrize("text, shape", [("2x3x224x224", (2, 3, 224, 224)), ("7", (7,)), (" 2X3 ", (2, 3))])
def test_parse_input(text, shape):
    assert models.parse_input(text) == shape


@pytest.mark.parametrize("text", ["", "2x", "x3", "2x-3", "2x0", "2*3", "2x3.5", "axb", "²x3"])
def test_parse_input_refuses(text):
    with pytest.raises(ValueError, match="like 2x3x224x224"):
        models.parse_input(text)


def test_several_inputs():
    assert models.parse_inputs("2x3x8x8, 2x10") == [(2, 3, 8, 8), (2, 10)]
    assert models.parse_inputs("4x4") == [(4, 4)]
    with pytest.raises(ValueError, match="parse_inputs"):
        models.parse_input("2x3,4")
    with pytest.raises(ValueError, match="is not a shape"):
        models.parse_inputs("2x3,")


@pytest.mark.parametrize(
    "spec, shape",
    [
        ("torchvision:squeezenet1_1", (2, 3, 224, 224)),
        ("torchvision:inception_v3", (2, 3, 299, 299)),
        ("torchvision:r3d_18", (2, 3, 16, 112, 112)),
        ("torchvision:fasterrcnn_mobilenet_v3_large_fpn", None),
        ("timm:tinynet_e", (2, 3, 106, 106)),
        ("timm:test_resnet", (2, 3, 160, 160)),
        ("torch.nn:Identity", None),
    ],
)
def test_default_input(spec, shape):
    with torch.device("meta"):
        model = models.load(spec)
    assert models.default_input(spec, model) == shape


# --- digits -------------------------------------------------------------------------------------------


def test_digits_are_enlarged_standardized_images():
    state = torch.get_rng_state()
    batches = list(digits.batches(256, size=8))
    images = torch.cat([images for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    assert torch.equal(torch.get_rng_state(), state)
    assert (images.shape, images.dtype) == ((7 * 256, 3, 8, 8), torch.float32)
    assert (labels.shape, labels.dtype) == ((7 * 256,), torch.int64)
    assert labels.unique().tolist() == list(range(10))
    assert images.is_contiguous()
    assert torch.equal(images[:, 0], images[:, 2])
    # all but five of the 1797 images: nearly the mean and deviation of the whole
    assert abs(images.mean()) < 1e-2
    assert abs(images.std() - 1) < 1e-2
    means = torch.stack([images[labels == digit].mean(0) for digit in range(10)])
    nearest = torch.cdist(images.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == labels).float().mean() > 0.85  # labels belong to their images


def test_digits_follow_the_seed():
    first, again, other = (next(digits.batches(4, seed=seed)) for seed in (0, 0, 1))
    assert first[0].shape == (4, 3, 64, 64)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("options, name", [({"batch_size": 0}, "batch_size"), ({"batch_size": 1798}, "batch_size")])
def test_digits_refuse_before_the_first_batch(options, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        digits.batches(**options)
    with pytest.raises(ValueError, match="`size`"):
        digits.batches(4, size=0)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "normpass\[demo\]"'):
        digits.batches(4)
