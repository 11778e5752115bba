"""A configuration that makes no sense is refused with the name of its field."""

import msgspec
import pytest

from loader.config import LoaderConfig


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b'{"host_tier_bytes": 0}', "host_tier_bytes must be greater than 0, got 0"),
        (b'{"num_read_threads": -1}', "num_read_threads must be greater than 0, got -1"),
        (b'{"adapter_roots": ["a"]}', "adapter_roots must be absolute, got 'a'"),
        (b'{"lora_dir": "a"}', "lora_dir must be absolute, got 'a'"),
        (b'{"model": "a"}', "model must be absolute, got 'a'"),
        (b'{"row_scale_cache": "a"}', "row_scale_cache must be absolute, got 'a'"),
        (b'{"row_scale_cache_bytes": 0}', "row_scale_cache_bytes must be greater than 0, got 0"),
        (b'{"inject_read_delay_s": -1.0}', "inject_read_delay_s must be ≥ 0, got -1.0"),
        (b'{"hots_tier_bytes": 1}', "unknown field `hots_tier_bytes`"),
    ],
)
def test_nonsense_is_refused_by_name(document: bytes, message: str) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(document, type=LoaderConfig)
    assert message in str(caught.value)
