"""Data sets: what is read, where it is looked for, and what is said when it cannot be."""

import hashlib
import io
import pickle
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from cl_lib.data import datasets, readers
from cl_lib.data.datasets import Dataset, data_root, join, load
from cl_lib.errors import InputError

RAW = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw"}
UNPACKED = {**RAW, "cifar100": "cifar-100-python"}


def tiny(n=6, classes=2, shape=(1, 3, 3), dtype=torch.uint8, name="tiny"):
    x = torch.randint(256, (n, *shape), generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.arange(n) % classes
    return Dataset(name, x, y, x[:classes], y[:classes], tuple(map(str, range(classes))))


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
        Dataset("tiny", data.x, data.y, data.x_test, data.y_test, ("a", "b")),
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
        ({"y": torch.zeros(6)}, "give int64"),
        ({"y": torch.full((6,), 2)}, "run from 2 to 2, but it names 2 classes"),
        ({"x_test": torch.zeros(2, 1, 3, 3)}, "give one kind"),
        ({"x_test": torch.zeros(2, 3, 3, 3, dtype=torch.uint8)}, "give one kind"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message):
    parts = {name: getattr(tiny(), name) for name in ("name", "x", "y", "x_test", "y_test", "classes")}
    with pytest.raises(InputError, match=message):
        Dataset(**{**parts, **change})


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
    data, sizes = join([both, both], "mine")
    assert sizes == [2, 2]
    assert data.classes == ("ape", "cat", "ape", "cat")
    assert data.y.tolist() == [1, 0, 1, 3, 2, 3]
    assert data.y_test.tolist() == [0, 1, 2, 3]
    assert data.x.shape == (6, 3, 4, 4)
    assert data.x[2, :, 0, 0].tolist() == [2, 0, 2]

    vectors = TensorDataset(torch.rand(5, 7), torch.tensor([7, 3, 3, 7, 3]))
    plain, _ = join([(vectors, vectors)], "vectors")
    loaded, _ = join([(DataLoader(vectors, 2), DataLoader(vectors, 3))], "vectors")
    assert plain.x.shape == (5, 1, 1, 7)
    assert plain.classes == ("3", "7")
    assert plain.fingerprint == loaded.fingerprint


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
    ],
)
def test_sources_that_do_not_fit_are_refused(tasks, message):
    with pytest.raises(InputError, match=message):
        join(tasks, "mine")
