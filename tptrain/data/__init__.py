"""From text to the rows of a batch, in the order in which data flows:

    sources      where documents come from: text, jsonl, parquet, a saved folder, the hub, python_docs; memorize has none
    documents    their texts, as rows of a memory-mapped `datasets.Dataset`
    tokenizers   text -> ids: bytes, a Hugging Face tokenizer (`hf_tokenizer`, `hub_tokenizer`) or a learned one (`train_tokenizer`)
    splits       which documents are held out for evaluation
    shards       a range of documents -> files of ids; in several processes by `tokenise` and `workers`
    build        `build_store`: find the store of a source or make it, once; `repair` for one that is damaged
    store        the ids on disk, memory-mapped (`tokens`): one folder that is whole or absent
    prepare      `prepare`: refuse, find or build all stores of a run; once, before ranks start
    stores       which stores those are: the folder that `prepare` hands to the ranks
    sampler      `Sampler`: which window of a store is sample number g
    mixture      `Mixture`: which source's which sample is sample number g
    stream       `StreamRows`: samples straight from a stream, dealt out to lanes (`dealer`, `lane`)
    dataset      `open_data`: the samples that a run trains and evaluates on; `open_validation`: the latter alone
    prefetch     `Prefetch`: reads them in the background

Nothing here imports torch: a bad `data.path` is refused before anything slow begins.
"""

from tptrain.data.dataset import Data, Validation, open_data, open_validation
from tptrain.data.mixture import Mixture
from tptrain.data.prefetch import Prefetch
from tptrain.data.prepare import prepare
from tptrain.data.rows import Rows
from tptrain.data.run_tokenizer import keep_tokenizer
from tptrain.data.sampler import Sampler, permute
from tptrain.data.store import Split, StoreError, TokenStore
from tptrain.data.tokenizers import ByteTokenizer, load_tokenizer

__all__ = [
    "ByteTokenizer", "Data", "Mixture", "Prefetch", "Rows", "Sampler", "Split", "StoreError", "TokenStore", "Validation",
    "keep_tokenizer", "load_tokenizer", "open_data", "open_validation", "permute", "prepare",
]  # fmt: skip
