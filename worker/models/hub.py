"""Model directories from the Hugging Face hub: config, tokenizer and safetensors, nothing that could hold code."""

from __future__ import annotations

from pathlib import Path

from worker.models.base import ModelError
from worker.models.weights import one_line

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
"""Config, tokenizer and chat template files."""

WEIGHT_FILES = ("model*.safetensors",)


def download(model: str, *, with_weights: bool = True) -> Path:
    """The local directory of a hub model; fetches what the cache lacks. Raises ModelError with the mend."""
    from huggingface_hub import errors, snapshot_download

    patterns = [*SMALL_FILES, *(WEIGHT_FILES if with_weights else ())]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise ModelError(
            f"hub model {model} is gated: accept its terms on huggingface.co and log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"there is neither a directory nor a hub model {model}; check the name, or log in if it is private"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(
            f"there is no directory {model}, and the hub cannot be reached to download a model of that name; "
            "check the network or give a directory"
        ) from error
    except Exception as error:  # the hub client raises those of its HTTP library, too
        raise ModelError(f"hub model {model} cannot be downloaded: {one_line(error)}") from error
