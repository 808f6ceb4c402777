"""How large the parts of `benchmark.py suite` are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """
    Of one suite.

    Args:
        product: of the square matrices whose product shows the rate.
        copy_bytes: of the copy that shows the bandwidth.
        repeats: of each timing but those of training steps.
        encoder: a model of [`load_model`], with the size of its batches.
        decoder: likewise.
        steps: of a run, and how many of them a side takes in turn.
        cache_length: places in the static cache of a decoder.
        matrices: to be decomposed: the shapes of the encoder, then larger ones.
        decomposition_seconds: what decompositions may take in all.
        compiled_ratio: of the one compacted model that is compiled.
        backend: of `torch.compile`.
        compiled_seconds: which have to remain, or nothing is compiled.
    """

    product: int
    copy_bytes: int
    repeats: int
    encoder: str
    encoder_batch: int
    encoder_length: int
    decoder: str
    decoder_batch: int
    decoder_length: int
    cache_length: int
    steps: int
    turn: int
    profiled_steps: int
    memory_steps: int
    decoder_steps: int
    compiled_steps: int
    matrices: tuple[tuple[int, int], ...]
    larger_matrices: tuple[tuple[int, int], ...]
    decomposition_seconds: float
    inference_batches: tuple[int, ...]
    inference_ratios: tuple[float, ...]
    decode_ratios: tuple[float, ...]
    compiled_ratio: float
    backend: str
    compiled_seconds: float


SIZES = {
    "h100": Sizes(
        product=8192,
        copy_bytes=2**31,
        repeats=20,
        encoder="bert-base",
        encoder_batch=32,
        encoder_length=128,
        decoder="llama-1b",
        decoder_batch=8,
        decoder_length=512,
        cache_length=256,
        steps=100,
        turn=4,
        profiled_steps=50,
        memory_steps=20,
        decoder_steps=50,
        compiled_steps=40,
        matrices=((768, 768), (3072, 768)),
        larger_matrices=((2048, 2048), (8192, 2048)),
        decomposition_seconds=60,
        inference_batches=(1, 32),
        inference_ratios=(0.5, 0.2, 0.1),
        decode_ratios=(0.5, 0.2),
        compiled_ratio=0.2,
        backend="inductor",
        compiled_seconds=150,
    ),
    "tiny": Sizes(
        product=64,
        copy_bytes=2**16,
        repeats=2,
        encoder="tiny",
        encoder_batch=4,
        encoder_length=16,
        decoder="tiny-llama",
        decoder_batch=2,
        decoder_length=16,
        cache_length=64,
        steps=10,
        turn=3,
        profiled_steps=15,
        memory_steps=10,
        decoder_steps=10,
        compiled_steps=10,
        matrices=((32, 32), (64, 32)),
        larger_matrices=((48, 48), (96, 48)),
        decomposition_seconds=5,
        inference_batches=(1, 4),
        inference_ratios=(0.5,),
        decode_ratios=(0.5,),
        compiled_ratio=0.5,
        backend="eager",
        compiled_seconds=0,
    ),
}
