"""`neuromf decode`: latents in, NIfTI volumes with sidecars, a montage and a quality report out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from neuromf.errors import UserError
from neuromf.generator import matching_autoencoder
from neuromf.pipeline.background import Background, writer_threads
from neuromf.pipeline.latent_sources import Encoded, Item, Samples, read_source
from neuromf.pipeline.sharing import Arrivals, Share, claim, take_own_gpu
from neuromf.pipeline.volume_folder import REPORT, Dtype, VolumeFolder

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Decoding:
    """How latents become files.

    Attributes:
        autoencoder: name or path, if it is not the one the latents name; its hash must agree all the same.
        weights: its weights file.
        memory: bytes it may take on the device; None looks at what is free. Volumes that need more are computed in
            slabs, which gives the same to rounding.
        batch_size: volumes decoded at once.
        dtype, compression: see `VolumeFolder`.
        montage: also draw `montage.png` of the first 16.
        as_scanned: write volumes of encoded scans on each scan's own voxels and intensities: all that was done to the
            scan is undone, as far as it can be (`data.restoration`).
    """

    autoencoder: str | None = None
    weights: Path | None = None
    memory: int | None = None
    batch_size: int = 1
    dtype: Dtype = "int16"
    compression: int = 1
    montage: bool = True
    as_scanned: bool = False


class DecodeReport(NamedTuple):
    """What was decoded: `made` by this process, `n` volumes are there, `failed` maps names to what the check found."""

    out: Path
    n: int
    made: int
    failed: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**self._asdict(), "out": str(self.out)}


def decode(
    latents: Path,
    out: Path | None = None,
    decoding: Decoding = Decoding(),
    *,
    device: str = "auto",
    progress: Progress | None = None,
) -> DecodeReport:
    """Decode the samples of `neuromf sample`, or the encoded latents of `neuromf encode`, to NIfTI volumes.

    Every process of a launcher takes its share of the batches; the main one waits for the others and writes the report.

    Args:
        latents: a folder with manifest.json or dataset.json.
        out: `<latents>/volumes` when None; sound volumes already there are kept, damaged ones are redone.
        decoding: with what, and how the volumes are stored.
        device: auto, cpu, cuda or mps.
        progress: callback (description, done, total).

    Raises:
        UserError: no latents there, an autoencoder with another hash, or a folder of other volumes; samples, which
            were never scanned, `as_scanned`.
    """
    take_own_gpu(device)
    source, share = read_source(Path(latents)), Share.own()
    made = done = 0
    with Decoder(source, out or Path(latents) / "volumes", decoding, device) as decoder:
        for block, members in groupby(source.numbers, key=lambda number: number // decoding.batch_size):
            numbers = list(members)
            if share.has(block):
                missing = [number for number in numbers if not decoder.has(number)]
                decoder.add({number: source.item(number) for number in missing})
                made += len(missing)
            done += len(numbers)
            if progress:
                progress("decoding", done, len(source.numbers))
    failed = decoder.finish(source.numbers) if share.main else {}
    return DecodeReport(decoder.volumes.path, len(source.numbers), made, failed)


class Decoder(AbstractContextManager["Decoder"]):
    """Decodes latents into a folder, while threads check, compress and write the volumes before.

    A latent is always decoded at its own place (its number modulo the batch size) of a batch of full size, with zeros
    in places where there is nothing to do: its bits then depend neither on what an earlier call has finished nor on
    how processes share the work.

    Args:
        source: where the latents come from.
        folder: of the volumes; made on entering the `with` block.
        decoding: with what, and how the volumes are stored.
        device: auto, cpu, cuda or mps.

    Raises:
        UserError: an autoencoder with another hash, a folder of other volumes, or samples `as_scanned`.
    """

    def __init__(self, source: Samples | Encoded, folder: Path, decoding: Decoding, device: str) -> None:
        if decoding.as_scanned and isinstance(source, Samples):
            raise UserError(
                "samples were never scanned: they have the training grid alone",
                "leave out --as-scanned, which is for the latents of `neuromf encode`",
            )
        recorded = source.autoencoder
        if decoding.autoencoder is not None:
            recorded = {**recorded, "name": decoding.autoencoder}
        self.model = matching_autoencoder(recorded, weights=decoding.weights, device=device, memory=decoding.memory)
        shape = tuple(n * self.model.factor for n in source.latent_shape[1:])
        self.source, self.decoding = source, decoding
        if decoding.as_scanned and source.pair:
            raise UserError("pairs are written on the training grid alone", "leave out --as-scanned")
        self.volumes = VolumeFolder(
            folder,
            None if decoding.as_scanned else shape,
            decoding.dtype,
            decoding.compression,
            masked=source.pair is not None,
        )
        self._arrivals = Arrivals(lambda number: self.volumes.volume(source.name(number)), self.has)
        autoencoder = {"name": self.model.name, "sha256": self.model.sha256, "licence": self.model.licence}
        self.record = {
            **source.identity,
            "autoencoder": autoencoder,
            "dtype": decoding.dtype,
            "suffix": self.volumes.suffix,
            "as_scanned": decoding.as_scanned or None,
        }
        self._claim(dry_run=True)
        threads = writer_threads()
        self._writers = Background(threads, waiting=2 * threads)

    def _claim(self, *, dry_run: bool) -> None:
        keys = [f"{kind}.{key}" for kind, values in self.source.identity.items() for key in values]
        keys += ["autoencoder.sha256", "dtype", "suffix", "as_scanned"]
        claim(self.volumes.path, REPORT, self.record, keys, "volumes", dry_run=dry_run)

    def __enter__(self) -> Decoder:
        self._claim(dry_run=False)
        return self

    def has(self, number: int) -> bool:
        """Whether a volume is there, whole."""
        return self.volumes.holds(self.source.name(number), self.source.origin(number))

    def add(self, items: Mapping[int, Item]) -> None:
        """Decode latents by their numbers, and hand them to the writers; raises what an earlier write raised."""
        size = self.decoding.batch_size
        for _, members in groupby(sorted(items), key=lambda number: number // size):
            with self._arrivals.block():
                self._add_block({number: items[number] for number in members})

    def _add_block(self, items: Mapping[int, Item]) -> None:
        """As `add`, of latents that have their places in one batch."""
        size = self.decoding.batch_size
        batch = torch.zeros(size, *self.source.latent_shape)
        for number, item in items.items():
            batch[number % size] = item.latent
        pair = self.source.pair
        images = batch if pair is None else pair.image(batch)
        volumes = self.model.decode(images.to(self.model.device)).float().cpu().numpy()
        masks = None if pair is None else pair.decode_mask(batch, self.model).numpy()
        for number, item in items.items():
            if masks is not None:
                self.volumes.write_mask(item.name, masks[number % size, 0], item.affine)
            note = {**item.sidecar, "Autoencoder": self.record["autoencoder"]}
            prepared = item.prepared if self.decoding.as_scanned else None
            self._writers.add(self.volumes.write, item.name, volumes[number % size, 0], item.affine, note, prepared)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until everything is written."""
        self._writers.__exit__(kind, error, trace)

    def finish(self, numbers: Sequence[int], slowest_s: float = 0.0) -> dict[str, str]:
        """Wait for the volumes of other processes, then write report and montage; the main process does it.

        Args:
            numbers: of all processes.
            slowest_s: what the slowest block took here, where there was more to do to it than to decode it.

        Returns:
            What the check found, by name, in the whole folder.
        """
        self._arrivals.slowest_s = max(slowest_s, self._arrivals.slowest_s)
        self._arrivals.wait(numbers, "volumes")
        return self.volumes.finish(self.record, self.decoding.montage)
