"""Scores by an Inception network: numbers, the cache, and what is said where it is missing.

The network has random weights, a small input and, for speed, compares an early layer; what it
computes has no meaning as a score, but must be computed the same way.
"""

import json
import math
import pickle
import socket
import sys

import numpy as np
import pytest
import torch

import inception_scores as module
from data import Split, enlarge, to_x_start
from inception_scores import InceptionUnavailable

SIZE = 16


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """A file of weights for torch-fidelity's network, scaled to keep activations alive."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # it cannot be built without a file
        patch.setattr(torch, "load", lambda *args, **kwargs: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3(
            module.EXTRACTOR, ["2048"], feature_extractor_weights_path="none"
        )
    state = network.state_dict()
    for weight in state.values():
        if weight.dim() > 1:
            weight.normal_(std=math.sqrt(2 / weight[0].numel()))
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save({name: value.half() for name, value in state.items()}, path)
    yield path
    path.unlink()  # 50 MB


@pytest.fixture
def weights(random_weights, monkeypatch):
    from torch_fidelity import FeatureExtractorInceptionV3

    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)  # the least possible
    monkeypatch.setattr(module, "FEATURES", "192")
    return random_weights


def images(count: int, seed: int, size: int = SIZE, brightest: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, size, size)
    return torch.randint(brightest, shape, generator=generator, dtype=torch.uint8)


def split(pixels: torch.Tensor) -> Split:
    return Split(pixels, torch.zeros(len(pixels), dtype=torch.int64))


REFERENCE, HELD_OUT = split(images(12, 0)), split(images(6, 1))


@pytest.fixture
def score(weights, tmp_path, monkeypatch):
    """score(pictures, **changes): the scores, and in score.extracted what was extracted anew."""

    def run(pictures, reference=REFERENCE, held_out=HELD_OUT, **changes):
        run.extracted = []

        def progress(items, total, what):
            run.extracted.append(what.removeprefix("features of ").removeprefix("the "))
            batches = list(items)
            assert len(batches) == total
            return batches

        monkeypatch.setattr(module, "progress", progress)
        options = {"cache": tmp_path / "cache", "weights": weights, "device": "cpu",
                   "batch_size": 5, **changes}
        return module.inception_scores(pictures, reference, held_out, **options)

    return run


def features_and_logits(weights, pictures):
    """Straight from torch-fidelity's network, as float64 arrays."""
    from torch_fidelity import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3(
        module.EXTRACTOR, [module.FEATURES, module.LOGITS],
        feature_extractor_weights_path=str(weights),
    )
    with torch.no_grad():
        return [layer.double().numpy() for layer in network(pictures)]


def frechet_distance(a, b):
    """With no matrix square root: tr (S_a S_b)^(1/2) is the nuclear norm of A B^T."""
    a_centred, b_centred = (
        (x - x.mean(axis=0)) / math.sqrt(len(x) - 1) for x in (a, b)
    )
    cross = np.linalg.svd(a_centred @ b_centred.T, compute_uv=False).sum()
    shift = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum()
    return shift + (a_centred**2).sum() + (b_centred**2).sum() - 2 * cross


def published_fid(a, b):
    """As torch-fidelity computes it."""
    from torch_fidelity import metric_fid

    statistics = [metric_fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    metric = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    return metric[metric_fid.KEY_METRIC_FID]


def squared_mmd(a, b):
    """Unbiased, with the kernel (x.y / D + 1)^3."""

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    within = sum(
        (kernel(x, x).sum() - np.trace(kernel(x, x))) / (len(x) * (len(x) - 1)) for x in (a, b)
    )
    return within - 2 * kernel(a, b).mean()


def coverage(points, manifold, neighbours):
    """The part of points inside the ball of any point of manifold."""
    distances = np.linalg.norm(manifold[:, None] - manifold[None], axis=-1)
    radii = np.sort(distances, axis=1)[:, neighbours]  # column 0 is the point itself
    across = np.linalg.norm(points[:, None] - manifold[None], axis=-1)
    return (across <= radii).any(axis=1).mean()


# ---- the numbers ---------------------------------------------------------------------------------


def test_every_score_agrees_with_its_definition_in_float64(score, weights, monkeypatch):
    monkeypatch.setattr(module, "IS_SPLITS", 1)  # so that the order of the pictures is of no matter
    # As many as the reference, so that KID's subsets are all alike; some good, some bad.
    pictures = torch.cat([REFERENCE.images[:3], images(9, 2, brightest=200)])
    result = score(pictures)
    a, logits = features_and_logits(weights, pictures)
    b, _ = features_and_logits(weights, REFERENCE.images)
    p = np.exp(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    divergence = (p * np.log(p / p.mean(axis=0))).sum(axis=1)

    assert result["fid"] == pytest.approx(frechet_distance(a, b), rel=1e-3)
    assert result["fid"] == pytest.approx(published_fid(a, b), rel=1e-3)
    assert result["kid_mean"] == pytest.approx(squared_mmd(a, b), rel=1e-3)
    assert result["kid_std"] == pytest.approx(0, abs=1e-5)
    assert result["inception_score_mean"] == pytest.approx(np.exp(divergence.mean()), rel=1e-4)
    assert result["precision"] == pytest.approx(coverage(a, b, 3))
    assert result["recall"] == pytest.approx(coverage(b, a, 3))
    assert 0 < result["precision"] < result["recall"]


def test_the_same_pictures_are_at_distance_zero_and_others_farther(score):
    same = score(REFERENCE.images)
    other = score(images(12, 3, brightest=128))
    assert same["fid"] == pytest.approx(0, abs=1e-3 * other["fid"])
    assert same["kid_mean"] < other["kid_mean"]
    assert same["precision"] == same["recall"] == 1
    assert same["floor"] == other["floor"]
    assert 0 < other["floor"]["fid"] < other["fid"]


def test_the_result_is_plain_repeatable_silent_and_says_what_it_is(score, tmp_path, capfd):
    result = score(images(7, 4))
    assert json.loads(json.dumps(result)) == result
    assert score(images(7, 4), cache=tmp_path / "another") == result
    assert capfd.readouterr() == ("", "")
    import torch_fidelity

    assert result["torch_fidelity"] == torch_fidelity.__version__
    assert result["extractor"] == "inception-v3-compat" and not result["published_weights"]
    assert result["resize"] == "bilinear as in TensorFlow 1, 16 to 75 pixels"
    assert (result["n"], result["n_floor"], result["n_reference"]) == (7, 6, 12)
    assert (result["kid_subset_size"], result["inception_score_splits"]) == (7, 7)


def test_fid_to_hold_against_the_floor_takes_as_many_pictures(score):
    pictures = images(9, 5)
    result = score(pictures)
    assert result["floor"]["n"] == result["n_floor"] == 6 < result["n"]
    as_many = score(pictures[module.choose(9, 6)])
    assert result["fid_at_n_floor"] == pytest.approx(as_many["fid"], rel=1e-4)
    assert as_many["fid_at_n_floor"] == as_many["fid"] != result["fid"]


def test_held_out_images_are_chosen_from_the_whole_split():
    chosen = module.choose(1000, 100)
    assert len(chosen.unique()) == 100
    assert chosen.min() < 100 and chosen.max() >= 900  # whatever the order of the classes
    assert len((chosen % 10).unique()) == 10


@pytest.mark.parametrize("count", [2, 3, 4])
def test_few_pictures_shrink_what_is_compared(score, count):
    result = score(images(count, 6))
    assert result["neighbours"] == min(count - 1, 3)
    assert result["kid_subset_size"] == result["inception_score_splits"] == count
    numbers = [value for value in (*result.values(), *result["floor"].values())
               if isinstance(value, (int, float))]
    assert all(math.isfinite(value) for value in numbers)


def test_what_cannot_be_scored_is_refused(score, tmp_path):
    with pytest.raises(InceptionUnavailable, match="at least 2 .* not 1, 12 and 6; draw more"):
        score(images(1, 0))
    with pytest.raises(InceptionUnavailable, match="not 4, 12 and 1"):
        score(images(4, 0), held_out=split(images(1, 0)))
    assert not (tmp_path / "cache").exists()


def test_small_images_are_enlarged_as_the_model_sees_them():
    every = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 3, 2, 2)
    assert torch.equal(enlarge(every, 2), every)
    enlarged = enlarge(images(4, 0, size=8), SIZE)
    assert enlarged.dtype == torch.uint8
    x_start = enlarged.float() / 127.5 - 1
    assert (x_start - to_x_start(images(4, 0, size=8), SIZE)).abs().max() < 0.51 / 127.5


def test_reference_and_held_out_images_are_enlarged_to_the_pictures(score):
    small = split(images(12, 7, size=8))
    result = score(enlarge(small.images, SIZE), reference=small, held_out=small)
    assert result["image_size"] == SIZE
    assert result["precision"] == result["recall"] == result["floor"]["recall"] == 1
    assert abs(result["fid"]) < 1e-3 * score(images(12, 0), reference=small)["fid"]


def test_memory_that_runs_out_makes_all_later_batches_smaller():
    asked = []

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, batch):
            asked.append(len(batch))
            if len(batch) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return batch.float().mean((2, 3)), batch[:, :, 0, 0]

    pictures = images(20, 0)
    features, corners = module.extract_features(Small(), SIZE, 8, pictures, "features")
    assert asked == [8, 4, *10 * [2]]
    torch.testing.assert_close(features, pictures.float().mean((2, 3)))
    assert torch.equal(corners, pictures[:, :, 0, 0])


# ---- the cache -----------------------------------------------------------------------------------


def test_reference_and_floor_are_extracted_once(score, weights, tmp_path):
    pictures = images(6, 8)
    result = score(pictures)
    assert score.extracted == ["reference", "held-out images", "pictures"]
    assert score(pictures) == result
    assert score.extracted == ["pictures"]
    score(pictures[:4])  # a floor of as many images
    assert score.extracted == ["held-out images", "pictures"]
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_nothing_cached_is_used_for_other_data_or_weights(score, weights, tmp_path):
    pictures = images(4, 8)
    first = score(pictures)
    pixels = HELD_OUT.images.clone()
    pixels[0, 0, 0, 0] ^= 1
    score(pictures, held_out=split(pixels))
    assert score.extracted == ["held-out images", "pictures"]
    score(pictures, reference=split(REFERENCE.images[:11]))
    assert score.extracted == ["reference", "held-out images", "pictures"]
    score(enlarge(pictures, 20))
    assert score.extracted == ["reference", "held-out images", "pictures"]

    state = torch.load(weights)
    state["Conv2d_1a_3x3.conv.weight"] *= 2
    torch.save(state, tmp_path / "other.pth")
    other = score(pictures, weights=tmp_path / "other.pth")
    assert score.extracted == ["reference", "held-out images", "pictures"]
    assert other["weights_sha256"] != first["weights_sha256"]
    assert score(pictures) == first and score.extracted == ["pictures"]


def test_a_damaged_cache_is_made_anew(score, tmp_path):
    pictures = images(4, 8)
    result = score(pictures)
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert score(pictures) == result
    assert score.extracted == ["reference", "held-out images", "pictures"]


# ---- what may be missing -------------------------------------------------------------------------


def one_sentence(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_without_the_package_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    for name in [name for name in sys.modules if name.startswith("torch_fidelity.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(InceptionUnavailable) as caught:
        module.inception_scores(
            images(4, 0), REFERENCE, HELD_OUT, cache=tmp_path, weights=None, device="cpu"
        )
    assert "pip install -r requirements-eval.txt" in one_sentence(caught)


@pytest.fixture
def published_at(weights, tmp_path, monkeypatch):
    """published_at(url): the weights are published there, and torch's cache is empty."""

    def publish(url):
        inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
        monkeypatch.setattr(inception, "URL_INCEPTION_V3", url)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        return tmp_path / "torch" / "hub" / "checkpoints" / url.rpartition("/")[2]

    return publish


def test_without_a_network_it_says_what_to_fetch(score, published_at, capfd):
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/inception.pth"
        path = published_at(url)
        with pytest.raises(InceptionUnavailable, match="internet access") as caught:
            score(images(4, 0), weights=None)
    message = one_sentence(caught)
    assert url in message and str(path) in message and "refused" in message
    assert list(path.parent.iterdir()) == [] and socket.getdefaulttimeout() is None
    assert capfd.readouterr() == ("", "")


def test_published_weights_are_fetched_once_and_checked(
    score, weights, published_at, tmp_path, monkeypatch
):
    url = weights.as_uri()
    path = published_at(url)
    with pytest.raises(InceptionUnavailable, match="invalid hash value") as caught:
        score(images(4, 0), weights=None)
    assert str(path) in one_sentence(caught) and not path.exists()

    sha256 = score(images(4, 0))["weights_sha256"]
    monkeypatch.setattr(module, "PUBLISHED_SHA256", sha256)
    assert score(images(4, 0), weights=None)["published_weights"]
    published_at("http://127.0.0.1:9/random.pth")
    assert score(images(4, 0), weights=None)["published_weights"]

    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InceptionUnavailable, match="put http://127.0.0.1:9/random.pth there"):
        score(images(4, 0), weights=None)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


def test_a_file_without_the_weights_is_refused(score, tmp_path):
    path = tmp_path / "weights.pth"
    victim = tmp_path / "victim"
    contents = {
        "empty": b"", "text": b"no weights", "hostile": pickle.dumps(Hostile(victim), protocol=2),
    }
    for name, content in contents.items():
        path.write_bytes(content)
        with pytest.raises(InceptionUnavailable, match="damaged or something else") as caught:
            score(images(4, 0), weights=path)
        assert str(path) in one_sentence(caught), name
    for state in (
        {"fc.weight": torch.zeros(2)},
        [1, 2],
        torch.zeros(3),
        {"state": Hostile(victim)},
    ):
        torch.save(state, path)
        with pytest.raises(InceptionUnavailable, match="damaged or something else") as caught:
            score(images(4, 0), weights=str(path))
        one_sentence(caught)
    assert not victim.exists()
    with pytest.raises(InceptionUnavailable, match="No such file"):
        score(images(4, 0), weights=tmp_path / "absent.pth")
    with pytest.raises(InceptionUnavailable, match="Is a directory"):
        score(images(4, 0), weights=tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_scores_on_the_gpu_are_those_of_the_cpu(score, tmp_path):
    pictures = images(12, 9, brightest=200)
    on_gpu = score(pictures, cache=tmp_path / "gpu", device="cuda")
    on_cpu = score(pictures)
    for name in ("fid", "kid_mean", "inception_score_mean", "precision", "recall"):
        assert on_gpu[name] == pytest.approx(on_cpu[name], rel=1e-2, abs=1e-3), name


def test_scores_are_those_of_their_publications():
    # Heusel et al. 2017; Binkowski et al. 2018; Salimans et al. 2016, in torch-fidelity's terms.
    assert (module.FEATURES, module.LOGITS) == ("2048", "logits_unbiased")
    assert (module.KID_SUBSETS, module.KID_SUBSET_SIZE, module.IS_SPLITS) == (100, 1000, 10)
