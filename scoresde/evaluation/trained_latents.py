"""The latents of a trained autoencoder: the transform `data.transform` of a run, and its cache on disk.

A run of latents names the run of its autoencoder, and stores a digest of the autoencoder's weights: it is loaded only
with the same autoencoder.

The mean and standard deviation of q(z | x) of a dataset are stored in `<autoencoder's run>/latents/<hash>.safetensors`.
The hash is that of the autoencoder and of all items of the dataset, so that any change of either encodes the data
again. For data with random augmentation, which differ at every access, set `cache=False`: every batch is then encoded
when it is needed. This also happens if q(z | x) depends on the dequantisation, as with the density `Normal`.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from scoresde import build
from scoresde.data.summary import state_of
from scoresde.dequantization import DataMap
from scoresde.pipelines.latent import BATCH, CachedLatents, Latents, MomentStates
from scoresde.progress import progress_bar
from scoresde.run_config import CONFIG
from scoresde.tensors import floating
from scoresde.training import checkpoint, distributed

FOLDER = "latents"


class TrainedLatents(Latents):
    """`Latents` of the autoencoder that `scoresde train` wrote to a run; see the module docstring.

    Args:
        run: the directory of the autoencoder's run, or its address on the Hugging Face hub.
        weights: see `build.load`.
        digest, data_shape, shift, scale: results of `fit`: the digest of the autoencoder, the shape of its data, and
            shift and scale of `Latents` for the training data.
        cache: whether training encodes the data once and stores the result.
        trust: see `build.instantiate`.

    Raises:
        FileNotFoundError: the autoencoder's run is missing.
        ValueError: the run has another autoencoder than that of the digest; see also `build.load_autoencoder`.
    """

    def __init__(
        self,
        run: str | Path,
        weights: str | float = "ema",
        digest: str | None = None,
        data_shape: Sequence[int] | None = None,
        shift: Any = None,
        scale: Any = None,
        cache: bool = True,
        trust: Sequence[str] = (),
    ):
        run = build.directory(run)
        if not (run / CONFIG).is_file():
            raise FileNotFoundError(
                f"the autoencoder of these latents must be in {run}; there is no run: restore it, or train it "
                "(scoresde train experiment=openmoji_autoencoder), and name it with data.transform.run=..."
            )
        loaded = build.load_autoencoder(run, weights, trust)
        super().__init__(loaded.autoencoder, loaded.pixels, shift, scale)
        if digest is not None and digest != self.digest:
            raise ValueError(
                f"{run} must have the autoencoder that these latents were made with, of digest {digest}; got "
                f"{self.digest}: restore that autoencoder, or train the diffusion of the latents again"
            )
        self.run, self.cache = run, cache

    def fit(self, dataset: Dataset) -> dict[str, Any]:
        """Return the digest, the shape of the data, and shift and scale for a dataset, see `Latents.fit`."""
        return {"digest": self.digest, "data_shape": list(self.data_shape), **super().fit(dataset)}

    def cached(self, dataset: Dataset, progress: bool = False) -> CachedLatents:
        """Return the dataset with the moments of q(z | x) in place of its items, from the cache; fill it if needed.

        Under torchrun the first process encodes, and the others wait.

        Raises:
            ValueError: an item differs between two accesses.
        """
        path = self.run / FOLDER / f"{self._key(dataset)}.safetensors"
        if distributed.rank() == 0 and not path.is_file():
            batches = list(torch.arange(len(dataset)).split(BATCH))  # type: ignore[arg-type]
            bar = progress_bar(batches, title="encoding the data", unit="batch", shown=progress)
            moments = torch.cat([self.moments(_items(dataset, rows)) for rows in bar])
            checkpoint.save(path, {"latents": {"moments": moments.float()}}, {"autoencoder": self.digest})
        distributed.gather(None)  # wait for the file
        return CachedLatents(dataset, checkpoint.load(path, needed=["latents"])[0]["latents"]["moments"])

    def _key(self, dataset: Dataset) -> str:
        hashed = hashlib.blake2b(self.digest.encode(), digest_size=16)
        first = _items(dataset, torch.arange(min(len(dataset), BATCH)))  # type: ignore[arg-type]
        if not torch.equal(first, _items(dataset, torch.arange(len(first)))):
            raise ValueError(
                "items must be equal at every access to be encoded once; these differ, as with random augmentation: "
                "set data.transform.cache=false"
            )
        for rows in torch.arange(len(dataset)).split(BATCH):  # type: ignore[arg-type]
            items = _items(dataset, rows).contiguous()
            hashed.update(f"{items.dtype} {tuple(items.shape)}".encode())
            hashed.update(items.reshape(-1).view(torch.uint8).numpy().tobytes())
        return hashed.hexdigest()


def _items(dataset: Any, rows: Tensor) -> Tensor:
    return default_collate([state_of(dataset[int(i)]) for i in rows])


def cached(dataset: Dataset, data_map: DataMap, progress: bool = False) -> tuple[Dataset, DataMap]:
    """Return a dataset and its data map for training; those of cached latents if the transform caches its states.

    Moments that depend on the dequantisation are not cached, because every draw has its own.
    """
    transform: Any = data_map.transform
    if not getattr(transform, "cache", False):
        return dataset, data_map
    if data_map.dequantization is not None:
        first = floating(_items(dataset, torch.arange(min(len(dataset), BATCH))))  # type: ignore[arg-type]
        within = [transform.autoencoder.density.canonical(transform.pixels(first + u)) for u in (0.0, 0.5)]
        if not torch.equal(*within):
            return dataset, data_map
    return transform.cached(dataset, progress), DataMap(MomentStates(transform))
