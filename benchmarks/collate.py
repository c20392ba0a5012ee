"""From samples of a store to one batch: ids, masks, positions and multi-layer features.

    python benchmarks/collate.py [--json FILE] [--quick]

Ragged samples: 2048 tokens in 8, widths of EAGLE-3 at hidden 1024 (3 x 1024 and 1024), bf16. The
"fp8" case: e4m3 codes with a float32 scale per token and layer. Results are compared before
anything is timed. Peers:

memcpy         the floor: as many bytes as come out, into memory that is there already
torch-cat      one torch.cat per tensor; fp8: torch's own conversion and a product first
padded-shift   what trainers with padded batches do: zero padding, then a copy of each feature and
               of ids and mask shifted by one
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from common import BenchScript, Report, time_interleaved
from specforge_ext import ops
from specforge_ext.ops import reference

LENGTHS = (512, 37, 300, 255, 401, 64, 350, 129)
WIDTHS, LAYERS = (3072, 1024), (3, 1)
CASES = ("bf16", "fp8")
BASELINE = "torch-cat"
Batch = tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Samples:
    ids: list[Tensor]
    masks: list[Tensor]
    features: list[list[Tensor]]
    scales: list[list[Tensor | None]]

    @property
    def num_bytes_out(self) -> int:
        return sum(2 * width * n for width in WIDTHS for n in map(len, self.ids))


def make_samples(case: str) -> Samples:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 1 << 17, (n,), generator=generator, dtype=torch.int32) for n in LENGTHS]
    masks = [torch.ones(n, dtype=torch.uint8) for n in LENGTHS]
    features: list[list[Tensor]] = []
    scales: list[list[Tensor | None]] = []
    for n in LENGTHS:
        values = [torch.randn(n, width, generator=generator) for width in WIDTHS]
        if case == "bf16":
            features.append([v.bfloat16() for v in values])
            scales.append([None, None])
        else:
            features.append([(v * 64).to(torch.float8_e4m3fn) for v in values])
            scales.append([torch.full((n, layers), 1 / 64) for layers in LAYERS])
    return Samples(ids, masks, features, scales)


def native(samples: Samples) -> Batch:
    return ops.pack_samples(samples.ids, samples.masks, samples.features, scales=samples.scales)


def torch_cat(samples: Samples) -> Batch:
    return reference.pack_samples(
        samples.ids, samples.masks, samples.features, scales=samples.scales
    )


def padded_shift(samples: Samples) -> list[Tensor]:
    """Each tensor [N, longest, ...], and the same one position on."""
    plain = [
        [
            f if s is None else reference.decode_fp8(f, s, torch.bfloat16)
            for f, s in zip(*rows, strict=True)
        ]
        for rows in zip(samples.features, samples.scales, strict=True)
    ]
    columns = [samples.ids, samples.masks, *(list(c) for c in zip(*plain, strict=True))]
    out = []
    for column in columns:
        batch = torch.nn.utils.rnn.pad_sequence(column, batch_first=True)
        shifted = pad(batch[:, 1:], (0, 0, 0, 1) if batch.dim() == 3 else (0, 1))
        out += [batch, shifted]
    return out


def memcpy(samples: Samples) -> Callable[[], object]:
    source = torch.ones(samples.num_bytes_out, dtype=torch.uint8)
    target = torch.empty_like(source).fill_(2)
    return lambda: target.copy_(source)


def implementations(samples: Samples) -> dict[str, Callable[[], object]]:
    return {
        BASELINE: lambda: torch_cat(samples),
        "specforge_ext": lambda: native(samples),
        "padded-shift": lambda: padded_shift(samples),
        "memcpy": memcpy(samples),
    }


def check(samples: Samples) -> None:
    """Raises if our batch is not torch's, or the padded one holds other values."""
    got, want, padded = native(samples), torch_cat(samples), padded_shift(samples)
    for a, b in zip((*got[:4], *got[4]), (*want[:4], *want[4]), strict=True):
        if not torch.equal(a, b):
            raise RuntimeError("collate: the packed batch differs from torch's")
    if not torch.equal(padded[4][1, : LENGTHS[1]], got[4][0][LENGTHS[0] : LENGTHS[0] + LENGTHS[1]]):
        raise RuntimeError("collate: the padded batch holds other features")


def main() -> None:
    script = BenchScript(__doc__ or "")
    if script.peak:
        case, impl = script.peak
        samples = make_samples(case)
        script.answer_peak(implementations(samples)[impl], torch.device("cpu"))
        return
    report = Report("collate", BASELINE)
    for case in CASES:
        samples = make_samples(case)
        check(samples)
        impls = implementations(samples)
        timings = time_interleaved(impls, rounds=7 if script.quick else 31)
        floor = timings["memcpy"].median_s
        for name in impls:
            peak = script.peak_bytes(case, name)
            report.add(
                case,
                name,
                timings[name],
                peak,
                gb_out_per_s=samples.num_bytes_out / timings[name].median_s / 1e9,
                share_of_memcpy=floor / timings[name].median_s,
            )
    if script.json:
        report.write(script.json)


if __name__ == "__main__":
    main()
