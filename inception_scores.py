"""FID, KID, Inception Score, precision and recall of pictures, by torch-fidelity's Inception.

The scores compare features of an Inception network. They depend on the number of pictures, so the
same scores of real held-out images, the floor, stand beside them. Features of the reference images
and scores of the floor are kept in a cache folder, under names made from everything they depend on.
"""

import hashlib
import os
from functools import partial
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cifar10 import noticing_silence
from classifier import cached, digest
from conditional_diffusion.checkpoint import DAMAGED
from conditional_diffusion.memory import in_parts
from data import Split, enlarge
from scores import frechet_distance
from training_monitor import progress

EXTRACTOR = "inception-v3-compat"  # torch-fidelity's port of the network that defines FID
FEATURES, LOGITS = "2048", "logits_unbiased"  # its layers; the second is for Inception Score
PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
CACHE_VERSION = 2  # raise it when what is cached, or a number below, changes
SEED = 2020  # of KID's subsets, the order before the splits, and the choice of n_floor images
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
IS_SPLITS = 10  # of Inception Score
PRC_NEIGHBOURS = 3  # whose farthest is the radius of precision and recall
DISTANCE_ROWS = 1000  # computed at once: 200 MB for 50,000 reference images


class InceptionUnavailable(Exception):
    """Pictures, torch-fidelity or its weights are missing; the message says how to get them."""


def inception_scores(
    pictures: Tensor, reference: Split, held_out: Split, *, cache: Path,
    weights: str | Path | None, device, batch_size: int = 64,
) -> dict:
    """Scores of pictures uint8 (N, 3, S, S), JSON-able, beside those of n_floor held-out images.

    reference and held_out are enlarged to S, batch by batch, as the model sees them. weights is a
    file of Inception weights; None takes torch's cache or downloads the published ones. Where the
    counts differ, "fid_at_n_floor" is the FID to hold against the floor's: it takes as many
    pictures, and FID falls with their number. Fewer than 1000 pictures shrink KID's subsets, fewer
    than 10 the splits, fewer than 4 the neighbourhood; what was used is returned.
    Raises InceptionUnavailable, also for fewer than two pictures, which have no variance.
    """
    n_floor = min(len(pictures), len(held_out))
    if min(n_floor, len(reference)) < 2:
        raise InceptionUnavailable(
            f"scores need at least 2 pictures, reference and held-out images, not {len(pictures)}, "
            f"{len(reference)} and {len(held_out)}; draw more pictures or use more data"
        )
    network, weights_sha256 = load_inception(weights, device)
    import torch_fidelity

    image_size = pictures.shape[-1]
    extract = partial(extract_features, network, image_size, batch_size)
    facts = {
        "extractor": EXTRACTOR, "torch_fidelity": torch_fidelity.__version__,
        "weights_sha256": weights_sha256, "published_weights": weights_sha256 == PUBLISHED_SHA256,
        "resize": f"bilinear as in TensorFlow 1, {image_size} to {network.INPUT_IMAGE_SIZE} pixels",
    }

    def look_at_reference() -> dict:
        return {"features": extract(reference.images, "features of the reference")[0]}

    def score_held_out() -> dict:
        chosen = held_out.images[choose(len(held_out), n_floor)]
        seen = extract(chosen, "features of held-out images")
        return compare(*seen, reference_features, device)

    key = digest(CACHE_VERSION, FEATURES, facts, reference.fingerprint)
    floor_key = digest(key, held_out.fingerprint)
    reference_features = cached(cache / f"reference-{key}.pt", look_at_reference)["features"]
    floor = cached(cache / f"floor-{floor_key}-{n_floor}.pt", score_held_out)

    features, logits = extract(pictures, "features of the pictures")
    scores = compare(features, logits, reference_features, device)
    fid_at_n_floor = scores["fid"]
    if n_floor < len(pictures):
        as_many = features[choose(len(pictures), n_floor)]
        fid_at_n_floor = frechet_distance(as_many, reference_features)
    return {
        **scores, "fid_at_n_floor": fid_at_n_floor, "n_floor": n_floor, "floor": floor,
        "n_reference": len(reference), "image_size": image_size, "seed": SEED, **facts,
    }


def load_inception(weights: str | Path | None, device) -> tuple[torch.nn.Module, str]:
    """The network on its device and the SHA-256 of its weights; InceptionUnavailable without."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (
            URL_INCEPTION_V3,
            FeatureExtractorInceptionV3,
        )
    except ImportError as error:
        raise InceptionUnavailable(
            f"these scores need torch-fidelity ({error}); `pip install -r requirements-eval.txt` "
            "installs it"
        ) from error
    path = Path(os.path.expanduser(weights)) if weights else published_weights(URL_INCEPTION_V3)
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if not weights and sha256 != PUBLISHED_SHA256:
            raise ValueError("wrong checksum")
        if sha256 != PUBLISHED_SHA256:
            # torch-fidelity would run code hidden in a file; this refuses such a file.
            torch.load(path, map_location="cpu", weights_only=True)
        network = FeatureExtractorInceptionV3(
            EXTRACTOR, [FEATURES, LOGITS], feature_extractor_weights_path=str(path)
        )
    except DAMAGED as error:
        reason = error.strerror if isinstance(error, OSError) else "damaged or something else"
        raise InceptionUnavailable(
            f"{path} does not give the Inception weights ({reason}); put {URL_INCEPTION_V3} there"
        ) from error
    return network.to(device), sha256


def published_weights(url: str) -> Path:
    """Where torch keeps the file of this URL, downloaded (95 MB) unless it is there."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with noticing_silence():
            torch.hub.download_url_to_file(url, str(path), PUBLISHED_SHA256, progress=False)
    except (OSError, RuntimeError, HTTPException) as error:
        raise InceptionUnavailable(
            f"the Inception weights could not be downloaded ({getattr(error, 'reason', error)}); "
            f"fetch {url} on a machine with internet access and put it at {path}"
        ) from error
    return path


@torch.no_grad()
def extract_features(
    network: torch.nn.Module, image_size: int, batch_size: int, images: Tensor, what: str
) -> tuple[Tensor, Tensor]:
    """Features (N, 2048) and logits (N, 1008), float32 on the CPU, of uint8 images (N, 3, S, S)."""
    device = next(network.parameters()).device

    def look(part: slice) -> list[Tensor]:
        return [layer.cpu() for layer in network(enlarge(images[part].to(device), image_size))]

    # TF32 would make the scores depend on the kind of GPU.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        parts = in_parts(look, len(images), batch_size, "pictures for Inception")
        layers = list(progress(parts, -(-len(images) // batch_size), what))
    features, logits = (torch.cat(batches) for batches in zip(*layers))
    return features, logits


def choose(count: int, n: int) -> Tensor:
    """n of count indices at random, since pictures may lie sorted by class."""
    return torch.from_numpy(np.random.default_rng(SEED).permutation(count)[:n])


def compare(features: Tensor, logits: Tensor, reference: Tensor, device) -> dict:
    """Every score of pictures with these features and logits, and the choices behind them."""
    import torch_fidelity as names
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    fewest = min(len(features), len(reference))
    subset_size, splits = min(KID_SUBSET_SIZE, fewest), min(IS_SPLITS, len(features))
    neighbours = min(PRC_NEIGHBOURS, fewest - 1)
    isc = isc_features_to_metric(logits, splits, shuffle=True, rng_seed=SEED)
    kid = kid_features_to_metric(
        features, reference, kid_subsets=KID_SUBSETS, kid_subset_size=subset_size, rng_seed=SEED,
        verbose=False,
    )
    # Without save_cpu_ram all distances are held at once: 10 GB and more for 50,000 images.
    prc = prc_features_to_metric(
        features.to(device), reference.to(device), prc_neighborhood=neighbours,
        prc_batch_size=DISTANCE_ROWS, save_cpu_ram=True, verbose=False,
    )
    return {
        "n": len(features),
        "fid": frechet_distance(features, reference),
        "kid_mean": kid[names.KEY_METRIC_KID_MEAN],
        "kid_std": kid[names.KEY_METRIC_KID_STD],
        "kid_subsets": KID_SUBSETS,
        "kid_subset_size": subset_size,
        "inception_score_mean": isc[names.KEY_METRIC_ISC_MEAN],
        "inception_score_std": isc[names.KEY_METRIC_ISC_STD],
        "inception_score_splits": splits,
        "precision": prc[names.KEY_METRIC_PRECISION],
        "recall": prc[names.KEY_METRIC_RECALL],
        "neighbours": neighbours,
    }
