"""What several tests share: comparisons."""

from hfslim.measuring.measurement import Comparison, Measurement
from hfslim.measuring.timing import Latency


def measurement(batch_size: int, scale: float) -> Measurement:
    return Measurement(
        inputs=f"input_ids [{batch_size}, 128]",
        parameters=int(2_000_000 * scale),
        parameters_without_embeddings=int(1_000_000 * scale),
        macs=int(3_000_000 * batch_size * scale),
        bytes=int(8_000_000 * scale),
        latency=Latency(
            p50_ms=10 * scale,
            p95_ms=12 * scale,
            throughput=100 * batch_size / scale,
            batch_size=batch_size,
            calls=30,
            threads=2,
            dtype="float32",
            device="cpu",
        ),
    )


def comparison(batch_size: int) -> Comparison:
    return Comparison(
        before=measurement(batch_size, 1.0),
        after=measurement(batch_size, 0.5),
        speedup=2.0,
        low=1.9,
        high=2.1,
    )
