"""What a KV layout may be."""

import re

import pytest

from biphase.kernels.kv_layout import KvLayout, KvScales, uniform_scales

SIZES = {"num_layers": 2, "num_kv_heads": 3, "head_dim": 4, "block_size": 16}
FP8 = "float8_e4m3fn"


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2), ("float16", 2), (FP8, 1)])
def test_item_sizes_follow_the_dtype(dtype: str, itemsize: int) -> None:
    scales = uniform_scales(2, 3) if dtype == FP8 else None
    layout = KvLayout(**SIZES, dtype=dtype, kv_scales=scales)
    assert (layout.itemsize, layout.token_bytes) == (itemsize, 2 * 2 * 3 * 4 * itemsize)
    assert KvLayout(**SIZES, dtype=dtype, itemsize=itemsize, kv_scales=scales) == layout


@pytest.mark.parametrize(
    ("dtype", "itemsize", "scales", "message"),
    [
        ("int8", 0, None, "KV dtype 'int8' is none of float32, bfloat16, float16, float8_e4m3fn"),
        ("bfloat16", 4, None, "itemsize is 4, bfloat16 has 2"),
        (FP8, 1, None, "kv_scales missing for a pool of float8_e4m3fn"),
        ("bfloat16", 0, uniform_scales(2, 3), "kv_scales given for a pool of bfloat16"),
        (FP8, 0, uniform_scales(2, 2), "kv_scales are not of shape [2, 2, 3]"),
        (FP8, 0, uniform_scales(1, 3), "kv_scales are not of shape [2, 2, 3]"),
        (FP8, 0, uniform_scales(2, 3, 0.0), "a KV scale is 0.0"),
        (FP8, 0, uniform_scales(2, 3, float("nan")), "a KV scale is nan"),
    ],
)
def test_what_does_not_fit_is_refused(dtype: str, itemsize: int, scales: KvScales | None, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        KvLayout(**SIZES, dtype=dtype, itemsize=itemsize, kv_scales=scales)
