"""Data sets: what is read, where it is looked for, and what is said when it cannot be."""

import hashlib
import io
import math
import pickle
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samples import coloured, vectors
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from cl_lib.data import datasets, readers
from cl_lib.data.datasets import Dataset, data_root, join, load
from cl_lib.errors import InputError

RAW = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw"}
UNPACKED = {**RAW, "cifar100": "cifar-100-python"}


def tiny():
    return coloured(6, 2, (1, 3, 3), name="tiny")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


# What is read -------------------------------------------------------------------------------------


def test_digits_hold_every_image_of_scikit_learn_exactly():
    data = load("digits")
    ours = torch.cat([data.x, data.x_test])
    values = (ours.double() * 16 / 255).round().view(-1, 64)
    given, labels = load_digits(return_X_y=True)
    mine = sorted(map(tuple, torch.cat([values, torch.cat([data.y, data.y_test])[:, None]], 1).tolist()))
    assert mine == sorted(map(tuple, np.column_stack([given, labels]).tolist()))


def test_digits_are_split_evenly_over_the_classes():
    data = load("digits")
    train, test = torch.bincount(data.y), torch.bincount(data.y_test)
    assert torch.equal(test, (train + test) // 5)
    assert (data.x.dtype, data.x.shape[1:], data.x.max(), data.classes) == (
        torch.uint8,
        (1, 8, 8),
        255,
        tuple("0123456789"),
    )


@pytest.mark.parametrize(
    ("name", "shape", "classes", "pixels"),
    [
        ("mnist", (1, 28, 28), 10, 0.1307),
        ("fashion-mnist", (1, 28, 28), 10, 0.2860),
        ("cifar100", (3, 32, 32), 100, 0.4782),
    ],
)
def test_published_data_sets(name, shape, classes, pixels):
    if not (data_root() / UNPACKED[name]).is_dir():
        pytest.skip(f"{name} is not under {data_root()}")
    data = load(name)
    n = 60_000 if name in RAW else 50_000
    assert data.x.shape == (n, *shape)
    assert len(data.x_test) == 10_000
    assert len(data.classes) == len(data.y_test.unique()) == classes
    assert abs(data.moments[0].mean().item() - pixels) < 1e-4


def test_the_second_load_is_the_first():
    assert load("digits") is load("digits")


def test_moments_are_the_mean_and_mean_square_of_each_pixel():
    data = load("digits")
    x = data.x.double() / 255
    for moment, exact in zip(data.moments, (x.mean(0), (x**2).mean(0)), strict=True):
        torch.testing.assert_close(moment, exact, rtol=1e-6, atol=0)


def test_the_fingerprint_sees_one_pixel_one_label_one_name():
    data = tiny()
    x, y = data.x.clone(), data.y.clone()
    x[3, 0, 1, 1] += 1
    y[3] = 0
    others = [
        Dataset("tiny", x, data.y, data.x_test, data.y_test, data.classes),
        Dataset("tiny", data.x, y, data.x_test, data.y_test, data.classes),
        Dataset("tiny", data.x, data.y, data.x_test, data.y_test, ("c", "d")),
    ]
    assert len({data.fingerprint, *(d.fingerprint for d in others)}) == 4
    assert tiny().fingerprint == data.fingerprint


def test_to_another_device_and_to_the_same():
    data = tiny()
    assert data.to("cpu") is data
    if torch.cuda.is_available():
        there = data.to("cuda")
        assert there.to("cuda") is there
        assert there.fingerprint == data.fingerprint


# Travelling to other processes --------------------------------------------------------------------


def test_a_loaded_data_set_travels_by_name():
    data = load("digits")
    assert len(pickle.dumps(data)) < 500
    assert pickle.loads(pickle.dumps(data)) is data


def test_any_other_data_set_travels_by_value():
    data = tiny()
    copy = pickle.loads(pickle.dumps(data))
    assert copy.fingerprint == data.fingerprint


# The data root ------------------------------------------------------------------------------------


def test_the_data_root_asked_for_wins_over_the_environment_over_the_checkout(tmp_path, monkeypatch):
    (tmp_path / "asked").mkdir()
    (tmp_path / "environment").mkdir()
    monkeypatch.delenv("CL_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert data_root() == Path(datasets.__file__).parents[2] / "data"
    monkeypatch.setenv("CL_DATA", str(tmp_path / "environment"))
    assert data_root() == tmp_path / "environment"
    assert data_root(tmp_path / "asked") == tmp_path / "asked"


def test_a_data_root_that_does_not_exist(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"nowhere.*root=.*does not exist: make it"):
        load("mnist", root=tmp_path / "nowhere")
    monkeypatch.setenv("CL_DATA", str(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"gone.*CL_DATA.*does not exist"):
        load("digits")


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'fashion-mnist'"):
        load("fashoin-mnist")
    with pytest.raises(InputError, match="not a data set that I know"):
        load(["mnist"])


# Files that are missing or damaged ----------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in datasets.NAMES if name != "digits"])
def test_no_network(name, tmp_path, no_network):
    with pytest.raises(InputError, match=r"not be downloaded .*no route to host.*root=.*CL_DATA") as caught:
        load(name, root=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", list(RAW))
def test_a_damaged_idx_file_is_named(name, tmp_path):
    folder = tmp_path / RAW[name]
    folder.mkdir(parents=True)
    for file in readers.IDX[folder.parent.name]:
        (folder / file).write_bytes(b"half of it")
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte is damaged.*delete it and run again"):
        load(name, root=tmp_path)


def test_a_damaged_cifar_file_is_named(tmp_path):
    from cl_lib._torchvision import datasets as tv

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for file, _ in [*tv.CIFAR10.train_list, *tv.CIFAR10.test_list, ("batches.meta", "")]:
        (folder / file).write_bytes(b"half of it")
    with pytest.raises(InputError, match=r"data_batch_1 is damaged or incomplete"):
        load("cifar10", root=tmp_path)


def test_a_file_deleted_as_told_is_fetched_again(tmp_path, monkeypatch):
    """The cure that the message names works, here with a server of our own in place of the network."""
    import gzip

    from cl_lib._torchvision import datasets as tv

    def idx(*shape):
        header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
        return header + bytes(i % 10 for i in range(int(np.prod(shape))))

    unpacked = {file: idx(20, 28, 28) if "images" in file else idx(20) for file in readers.IDX["MNIST"]}
    packed = {f"{file}.gz": gzip.compress(content) for file, content in unpacked.items()}
    md5 = lambda content: hashlib.md5(content).hexdigest()

    def fetch(url, path, *_args):
        Path(path).write_bytes(packed[url.rsplit("/", 1)[1]])

    monkeypatch.setattr(tv.MNIST, "resources", [(file, md5(content)) for file, content in packed.items()])
    monkeypatch.setattr(tv.utils, "_urlretrieve", fetch)
    monkeypatch.setattr(tv.utils, "_get_redirect_url", lambda url, **_: url)
    monkeypatch.setitem(readers.IDX, "MNIST", {file: md5(content) for file, content in unpacked.items()})

    assert load("mnist", root=tmp_path).x.shape == (20, 1, 28, 28)
    datasets._loaded.pop(("mnist", str(tmp_path)))
    broken = tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte"
    broken.write_bytes(broken.read_bytes()[:-1])
    with pytest.raises(InputError, match="t10k-labels"):
        load("mnist", root=tmp_path)
    broken.unlink()
    assert load("mnist", root=tmp_path).y_test.tolist() == [i % 10 for i in range(20)]
    datasets._loaded.pop(("mnist", str(tmp_path)))


# Folders of pictures ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A data root with a Tiny-ImageNet of two classes in the original layout, one of them grey."""
    root = tmp_path_factory.mktemp("root")
    folder = root / "tiny-imagenet-40"

    def write(file, mode, shade):
        buffer = io.BytesIO()
        Image.new(mode, (64, 64), shade).save(buffer, "JPEG")
        file.write_bytes(buffer.getvalue())

    notes = []
    (folder / "val/images").mkdir(parents=True)
    for wnid, mode, shade in ("n02", "RGB", (200, 100, 0)), ("n01", "L", 50):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        for i in range(500):
            write(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", mode, shade)
        for i in range(50):
            write(folder / "val/images" / f"{wnid}_{i}.JPEG", mode, shade)
            notes.append(f"{wnid}_{i}.JPEG\t{wnid}\t0\t0\t1\t1\n")
    (folder / "val/val_annotations.txt").write_text("".join(notes))
    (folder / "wnids.txt").write_text("n02\nn01\n")
    (folder / "words.txt").write_text("n01\tgrey cat, Felis\nn02\torange\n")
    return root


def forget(root):
    datasets._loaded.pop(("tiny-imagenet", str(root)), None)


def test_tiny_imagenet_is_decoded_once(pictures, monkeypatch):
    data = load("tiny-imagenet", root=pictures)
    assert data.classes == ("orange", "grey cat")
    assert data.x.shape == (1000, 3, 64, 64)
    assert torch.bincount(data.y_test).tolist() == [50, 50]
    assert data.x[0, :, 9, 9].tolist() == pytest.approx([200, 100, 0], abs=4)
    assert data.x[-1, :, 9, 9].tolist() == [50, 50, 50]

    forget(pictures)
    monkeypatch.setattr(readers, "_picture", None)  # decoding again would fail
    assert load("tiny-imagenet", root=pictures).fingerprint == data.fingerprint
    assert not list(pictures.glob("*.safetensors.*"))


def test_a_cache_cut_short_is_made_anew(pictures):
    before = load("tiny-imagenet", root=pictures).fingerprint
    cache = pictures / "tiny-imagenet-40.safetensors"
    with cache.open("r+b") as file:
        file.truncate(1000)
    forget(pictures)
    assert load("tiny-imagenet", root=pictures).fingerprint == before
    assert cache.stat().st_size > 1_000_000


def test_a_cache_that_cannot_be_written_is_done_without(pictures, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    (pictures / "tiny-imagenet-40.safetensors").unlink(missing_ok=True)
    forget(pictures)
    monkeypatch.setattr(readers, "save_file", full)
    assert len(load("tiny-imagenet", root=pictures).x) == 1000
    assert not list(pictures.glob("*.safetensors*"))


def test_missing_and_damaged_pictures_are_named(pictures, monkeypatch):
    (pictures / "tiny-imagenet-40.safetensors").unlink(missing_ok=True)
    picture = pictures / "tiny-imagenet-40/train/n01/images/n01_7.JPEG"
    whole = picture.read_bytes()
    try:
        forget(pictures)
        picture.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match=r"n01_7.JPEG is damaged"):
            load("tiny-imagenet", root=pictures)
        picture.unlink()
        with pytest.raises(InputError, match=r"tiny-imagenet-40 is incomplete \(999 of 1000 training images"):
            load("tiny-imagenet", root=pictures)
    finally:
        picture.write_bytes(whole)


def test_an_empty_folder_of_pictures(tmp_path):
    (tmp_path / "tiny-imagenet-200").mkdir()
    (tmp_path / "imagenette2-160").mkdir()
    for name in "tiny-imagenet", "imagenette":
        with pytest.raises(InputError, match="is incomplete"):
            load(name, root=tmp_path)


# Data sets of one's own ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6, 9)}, r"torch.float32 \[6, 9\]: give uint8 or float32"),
        ({"x": torch.zeros(6, 1, 3, 3, dtype=torch.int64)}, "give uint8 or float32"),
        ({"y": torch.zeros(5, dtype=torch.int64)}, "one for each of the 6 images"),
        ({"x": torch.zeros(6, 1, 3, 3, dtype=torch.complex64)}, "complex64 .*: give uint8 or float32"),
        ({"x": torch.zeros(6, 0, 3, 3)}, r"\[6, 0, 3, 3\]: give"),
        ({"x": [[1.0]]}, "x of 'tiny' is given as list: give a tensor or a NumPy array"),
        ({"x": np.full((6, 1, 3, 3), "red")}, "x of 'tiny' is an array of .*: give one of numbers"),
        (
            {"x": torch.zeros(6, 1, 3, 3).index_fill(0, torch.tensor([4, 5]), math.nan)},
            r"training images .* in image 4",
        ),
        ({"x_test": np.full((4, 1, 3, 3), -math.inf)}, "test images of 'tiny' hold nan or an infinity, .* image 0"),
        ({"y": torch.zeros(6)}, "give int64"),
        ({"y": torch.zeros(6, dtype=torch.bool)}, "torch.bool .*: give int64"),
        ({"y": np.linspace(0, 1, 6)}, "float64 .*: give int64"),
        ({"y": np.array([0, 1, 0, 1, 0, -1])}, "run from -1 to 1"),
        ({"classes": [0, 1]}, r"classes=\[0, 1\] of 'tiny' .* name of each class, a string"),
        ({"classes": "ab"}, "classes='ab'"),
        ({"classes": 2}, "classes=2"),
        ({"y": torch.full((6,), 2)}, "run from 2 to 2, but it names 2 classes"),
        ({"x_test": torch.zeros(4, 1, 3, 3)}, "give one kind"),
        ({"x_test": torch.zeros(4, 3, 3, 3, dtype=torch.uint8)}, "give one kind"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message):
    parts = {name: getattr(tiny(), name) for name in ("name", "x", "y", "x_test", "y_test", "classes")}
    with pytest.raises(InputError, match=message):
        Dataset(**{**parts, **change})


def test_arrays_are_taken_as_tensors_are():
    data = tiny()
    arrays = {name: getattr(data, name).numpy() for name in ("x", "y", "x_test", "y_test")}
    assert Dataset("tiny", **arrays, classes=["a", "b"]).fingerprint == data.fingerprint
    fixed = np.ascontiguousarray(arrays["x"])
    fixed.setflags(write=False)
    strange = {"x": fixed[::-1][::-1], "y": arrays["y"].astype(">i2"), "y_test": arrays["y_test"].astype(np.uint64)}
    assert Dataset("tiny", **{**arrays, **strange}, classes=("a", "b")).fingerprint == data.fingerprint


def test_floating_kinds_become_float32():
    data = tiny()
    x, x_test = (t.numpy() / 255 for t in (data.x, data.x_test))
    wide = Dataset("floats", x, data.y, torch.from_numpy(x_test).half(), data.y_test, data.classes)
    assert wide.x.dtype == wide.x_test.dtype == torch.float32
    torch.testing.assert_close(wide.x, data.x / 255)


class Pictures:
    """A torchvision-style data set of PIL images."""

    classes = ("ape", "bee", "cat")

    def __init__(self, labels, size=(4, 4)):
        self.labels, self.size = labels, size

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return Image.new("RGB", self.size, (self.labels[i], 0, i)), self.labels[i]


def test_join_reads_pictures_tensors_and_loaders():
    both = Pictures([2, 0, 2]), Pictures([0, 2])
    data, labels = join([both, both], "mine")
    assert labels == [[0, 2], [0, 2]]
    assert data.classes == ("ape", "cat", "ape", "cat")
    assert data.y.tolist() == [1, 0, 1, 3, 2, 3]
    assert data.y_test.tolist() == [0, 1, 2, 3]
    assert data.x.shape == (6, 3, 4, 4)
    assert data.x[2, :, 0, 0].tolist() == [2, 0, 2]

    table = TensorDataset(torch.rand(5, 7), torch.tensor([7, 3, 3, 7, 3]))
    plain, _ = join([(table, table)], "vectors")
    loaded, _ = join([(DataLoader(table, 2), DataLoader(table, 3))], "vectors")
    assert plain.x.shape == (5, 1, 1, 7)
    assert plain.classes == ("3", "7")
    assert plain.fingerprint == loaded.fingerprint


def test_join_reads_arrays_and_data_sets():
    data = tiny()
    whole, labels = join([data], "tiny")
    assert (whole.fingerprint, labels) == (data.fingerprint, [[0, 1]])
    tensors = (data.x, data.y), (data.x_test, data.y_test)
    arrays = [(x.permute(0, 2, 3, 1).numpy(), y.numpy()) for x, y in tensors]  # channels last, as in pictures
    for pair in tensors, arrays:
        read, _ = join([pair], "tiny")
        assert torch.equal(read.x, data.x)
        assert torch.equal(read.y_test, data.y_test)
        assert read.classes == ("0", "1")


def test_labels_of_every_integer_kind_are_read():
    x, kinds = torch.rand(1, 2, 2), (1, np.uint8(1), torch.tensor(1, dtype=torch.int16), np.array([1]))
    data, labels = join([([(x, label) for label in kinds], [(x, 1)])], "kinds")
    assert data.y.tolist() == [0] * 4 and labels == [[1]]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "no task"),
        ([Pictures([0])], r"Task 0 is given as Pictures: give a pair"),
        ([(Pictures([0]), Pictures([1]))], r"test set of task 0 has the label 1"),
        ([(Pictures([]), Pictures([]))], r"training set of task 0 cannot be read"),
        ([(["a", "b"], ["a", "b"])], r"cannot be read"),
        ([[Pictures([0])] * 2, [Pictures([0], (5, 5))] * 2], r"must be of one kind"),
        ([(5, 5)], "cannot be read"),
        ([vectors([0.7, 1.0])], r"training set of task 0 cannot be read \(the label 0\.[67]\d* is no whole number"),
        ([vectors([0, -1])], r"the label -1 is no whole number from 0 up.*give pairs \(image, whole number\)"),
        ([vectors([True, False])], "the label True is no whole number"),
        ([([(torch.rand(1, 2, 2), 2**70)],) * 2], "cannot be read"),
        ([([(torch.rand(1, 2, 2), torch.tensor([1, 2]))],) * 2], "cannot be read"),
        ([([(np.ones((2, 2), complex), 0)],) * 2], "an image holds complex numbers"),
        ([([(torch.full((1, 2, 2), math.nan), 0)],) * 2], "training images of 'mine' hold nan"),
    ],
)
def test_sources_that_do_not_fit_are_refused(tasks, message):
    with pytest.raises(InputError, match=message):
        join(tasks, "mine")
