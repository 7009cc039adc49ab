"""From text to the rows of a batch, in the order in which data flows:

    sources      the documents of python_docs, a file, a folder or a glob; or random ids (memorize)
    tokenizers   text -> ids
    splits       which documents are held out for evaluation
    store        the ids on disk, memory-mapped: one folder that is whole or absent
    build        `build_store`: find or build the store of one source
    prepare      `prepare`: refuse, find or build all stores of a run; once, before ranks start
    stores       which stores those are: the folder that `prepare` hands to the ranks
    sampler      `Sampler`: which window of a store is sample number g
    mixture      `Mixture`: which source's which sample is sample number g
    dataset      `open_data`: the samples that a run trains and evaluates on
    prefetch     `Prefetch`: reads them in the background

Nothing here imports torch: a bad `data.path` is refused before anything slow begins.
"""

from tptrain.data.dataset import Data, open_data
from tptrain.data.mixture import Mixture
from tptrain.data.prefetch import Prefetch
from tptrain.data.prepare import prepare
from tptrain.data.rows import Rows
from tptrain.data.sampler import Sampler, permute
from tptrain.data.store import Split, StoreError, TokenStore
from tptrain.data.tokenizers import ByteTokenizer, load_tokenizer

__all__ = [
    "ByteTokenizer", "Data", "Mixture", "Prefetch", "Rows", "Sampler", "Split", "StoreError", "TokenStore",
    "load_tokenizer", "open_data", "permute", "prepare",
]  # fmt: skip
