"""How well a tokenizer compresses the text of the model that it is for."""

from collections.abc import Iterable, Iterator

from nanochat.data.parquet import iter_texts
from nanochat.data.shards import shard_path
from nanochat.data.sources import Source
from nanochat.evaluation.tokenizer_quality import compression_ratio
from nanochat.store import ObjectStore
from nanochat.tokenizer import Tokenizer

_SAMPLE_CHARACTERS = 2_000_000


def bytes_per_token(store: ObjectStore, source: Source, tokenizer: Tokenizer) -> tuple[float, str]:
    """UTF-8 bytes a token on the start of the source's validation shard, and the shard's name.

    Where that one is not here, on the first training shard. Raises ShardError where neither is.
    """
    try:
        shard = source.validation_shard()
        path = shard_path(store, source.name, shard)
    except ValueError:
        shard = source.training_shards()[0]
        path = shard_path(store, source.name, shard)
    texts = _first_characters((text for _, text in iter_texts(path)), _SAMPLE_CHARACTERS)
    return compression_ratio(tokenizer, texts), shard


def _first_characters(texts: Iterable[str], most: int) -> Iterator[str]:
    for text in texts:
        if most <= 0:
            return
        yield text
        most -= len(text)
