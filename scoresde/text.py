"""Texts as conditions: the numbers of their tokens, or the features of a frozen encoder.

An encoder maps N captions to conditions with leading dimension N, as a transform maps data to model space:

    Tokens        {"text": integers (N, L)}       the input of `networks.TextEncoder`, trained with the network
    Pretrained    {"context": (N, L, features)}   the output of a frozen T5 encoder or CLIP text model

Shorter captions are padded with -1 or NaN, which attention leaves out. The empty caption is padding alone: the null
condition, with which classifier-free guidance compares. A frozen encoder stays outside of the checkpoint; its features
are computed once for each set of captions and kept on disk (as in Imagen, 2205.11487, section 2.1).

Both need the extra `text`: pip install 'scoresde[text]'.
"""

import difflib
import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from scoresde.arguments import MOST, Count, Named, Range, checked
from scoresde.atomic_files import replace_atomically
from scoresde.configured import Configured
from scoresde.protocols import NULL

TOKENIZER = "tokenizer.json"  # name of the file in a run's directory
UNKNOWN = "[UNK]"  # the token of words that the training captions lack
WORDS = r"[\w'\u2019-]+|[^\w\s]"  # a word, such as "medium-dark", or a mark of punctuation
NEAR, MOST_NEAR = 0.6, 3  # similarity and number of the words that a message suggests
ENCODERS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}  # classes of transformers, by the `model_type` of a configuration
BATCH = 64  # captions that a frozen encoder reads at a time

Path_ = Annotated[str | Path, Named("a path")]


def package(name: str) -> Any:
    """Import a package of the extra `text`; raise ImportError with the command that installs it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"texts need the package {name}: pip install 'scoresde[text]' ({error})") from error


def listed_captions(captions: Sequence[str]) -> list[str]:
    """Return captions as a list; raise TypeError for one text, whose characters would be read as captions."""
    found = [captions] if isinstance(captions, str) else list(captions)
    if isinstance(captions, str) or not all(isinstance(caption, str) for caption in found):
        wrong = next((caption for caption in found if not isinstance(caption, str)), captions)
        raise TypeError(f"captions must be a list of texts; got {wrong!r}: pass [{str(wrong)!r}]")
    return found


@checked
class Tokens(Configured):
    """Number the words of captions, or parts of words: `fit` trains a tokeniser, a call encodes captions.

        tokens = ss.text.Tokens().fit(data.captions, "tokenizer.json")
        tokens(["woman firefighter", ""])     # {"text": [[4, 11], [-1, -1]]}, for example

    Upper case is read as lower case. A caption of more than `length` tokens is cut, with a warning.

    Args:
        file: the trained tokeniser, a JSON file of the library `tokenizers`; None before `fit`. `scoresde train` stores
            it as `<run>/tokenizer.json`.
        length: number of tokens L to which captions are padded; None for that of the longest caption of `fit`.
        size: largest number of different tokens; after `fit` their number. With "words", rarer words are unknown.
        kind: "words", or "bpe" for parts of words that are merged by frequency (byte-pair encoding, 1508.07909).
    """

    def __init__(
        self,
        file: Path_ | None = None,
        length: Count | None = None,
        size: Annotated[int, Range(2, MOST)] = 8192,
        kind: Literal["words", "bpe"] = "words",
    ):
        self.file, self.length, self.size, self.kind = None if file is None else Path(file), length, size, kind

    def fit(self, captions: Sequence[str], file: str | Path) -> "Tokens":
        """Train a tokeniser on captions and write it to a file; return the `Tokens` that use it.

        Raises:
            TypeError: the captions are not a list of texts.
            ValueError: the captions have no words.
        """
        captions = listed_captions(captions)
        library = package("tokenizers")
        model, trainer = {
            "words": (library.models.WordLevel, library.trainers.WordLevelTrainer),
            "bpe": (library.models.BPE, library.trainers.BpeTrainer),
        }[self.kind]
        tokenizer = library.Tokenizer(model(unk_token=UNKNOWN))
        tokenizer.normalizer = library.normalizers.Lowercase()
        split = library.pre_tokenizers.Split(library.Regex(WORDS), behavior="removed", invert=True)
        tokenizer.pre_tokenizer = split
        settings = {"vocab_size": self.size, "special_tokens": [UNKNOWN], "show_progress": False}
        tokenizer.train_from_iterator(captions, trainer(**settings))
        longest = max((len(tokenizer.encode(caption)) for caption in captions), default=0)
        if not longest:
            raise ValueError(f"a tokeniser must be trained on captions with words; got {len(captions)} without any")
        tokenizer.enable_truncation(self.length or longest)
        return Tokens(file, self.length or longest, tokenizer.get_vocab_size(), self.kind).save(file, tokenizer)

    @classmethod
    def read(cls, file: str | Path) -> "Tokens":
        """Return the `Tokens` that `fit` wrote to a file.

        Raises:
            ValueError: the file is not a tokeniser, or has no length, so that `fit` did not write it.
            FileNotFoundError: the file is missing.
        """
        tokenizer = _read_tokenizer(Path(file))
        if tokenizer.truncation is None:
            raise ValueError(
                f"{file} must have a truncation, as Tokens.fit writes it; got none: train it by Tokens.fit"
            )
        kind: Any = "bpe" if "BPE" in type(tokenizer.model).__name__ else "words"
        return cls(file, tokenizer.truncation["max_length"], tokenizer.get_vocab_size(), kind)

    def save(self, file: str | Path, tokenizer: Any = None) -> "Tokens":
        """Write the tokeniser to a file, and return the `Tokens` that use this file."""
        text = (self.tokenizer if tokenizer is None else tokenizer).to_str(pretty=True)
        replace_atomically(Path(file), lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return Tokens(file, self.length, self.size, self.kind)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokeniser of the library `tokenizers`, which cuts captions to `length` tokens.

        Raises:
            ValueError: there is no file yet, or it is not a tokeniser.
            FileNotFoundError: the file is missing.
        """
        if self.file is None or self.length is None:
            raise ValueError("Tokens must be trained before they encode captions: call fit, or give file and length")
        tokenizer = _read_tokenizer(self.file)
        tokenizer.enable_truncation(self.length)
        tokenizer.no_padding()
        return tokenizer

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return {"text": int64 (N, L)}: the numbers of the tokens, then -1.

        Raises:
            TypeError: the captions are not a list of texts.
        """
        listed = [self.tokenizer.encode(caption) for caption in listed_captions(captions)]
        _warn_of_cuts(sum(bool(encoded.overflowing) for encoded in listed), len(listed), self.length)
        text = torch.full((len(listed), self.length or 0), NULL)
        for row, encoded in zip(text, listed, strict=True):
            row[: len(encoded.ids)] = torch.tensor(encoded.ids, dtype=torch.int64)
        return {"text": text}

    def check(self, captions: Sequence[str]) -> None:
        """Warn of words that the training captions lack, and name similar ones.

        Raises:
            TypeError: the captions are not a list of texts.
            ValueError: a caption has no known word.
        """
        captions = listed_captions(captions)
        known = [word for word in self.tokenizer.get_vocab() if word != UNKNOWN]
        for caption in captions:
            encoded = self.tokenizer.encode(caption)
            unknown = [
                caption[slice(*place)]
                for token, place in zip(encoded.tokens, encoded.offsets, strict=True)
                if token == UNKNOWN
            ]
            if not unknown:
                continue
            near = [difflib.get_close_matches(word.lower(), known, MOST_NEAR, NEAR) for word in unknown]
            parts = [
                f"{word!r}" + (f" (near: {', '.join(n)})" if n else "") for word, n in zip(unknown, near, strict=True)
            ]
            message = f"{caption!r} has words that the training captions lack: {', '.join(parts)}"
            if len(unknown) == len(encoded.tokens):
                raise ValueError(f"{message}; a caption must have a known word")
            warnings.warn(message, stacklevel=2)


@checked
class Pretrained(Configured):
    """The features of captions from a frozen T5 encoder or CLIP text model of `transformers`: its last hidden states.

    Nothing is downloaded, only weights in safetensors files are read, and no code of the model's folder is executed.

    Args:
        path: folder of the model with its tokeniser, or its name on the Hugging Face hub if the hub's cache has it.
        length: number of tokens L to which captions are padded; longer captions are cut, with a warning.
        cache: folder in which features are kept; None keeps none. The name of a file has a digest of the model's files,
            the captions and `length`.

    Raises:
        ImportError: `transformers` is not installed.
        FileNotFoundError: in a call, there is no such model.
        ValueError: in a call, the model is of another kind, or has no weights in safetensors files.
    """

    def __init__(self, path: Path_, length: Count = 32, cache: Path_ | None = "datasets/text"):
        self.path, self.length, self.cache = str(path), length, None if cache is None else Path(cache)

    @cached_property
    def folder(self) -> Path:
        """The folder with the files of the model."""
        if (Path(self.path) / "config.json").is_file():
            return Path(self.path)
        package("transformers")
        hub = import_module("huggingface_hub")
        try:
            return Path(hub.snapshot_download(self.path, local_files_only=True))
        except (hub.errors.LocalEntryNotFoundError, hub.errors.HFValidationError, OSError) as error:
            raise FileNotFoundError(
                f"path must be a folder with a T5 encoder or CLIP text model (config.json, *.safetensors and its "
                f"tokeniser), or the name of one in the hub's cache; got {self.path!r}: `hf download {self.path}` "
                "fetches a model of that name"
            ) from error

    @cached_property
    def digest(self) -> str:
        """A digest of the configuration, the tokeniser and the weights."""
        digest = hashlib.blake2b(digest_size=16)
        for file in sorted(self.folder.iterdir()):
            if file.suffix in (".json", ".safetensors", ".txt", ".model"):
                with open(file, "rb") as opened:
                    digest.update(file.name.encode() + hashlib.file_digest(opened, "blake2b").digest())
        return digest.hexdigest()

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return {"context": float32 (N, L, features)}, with NaN in the rows of padding and of empty captions.

        Raises:
            TypeError: the captions are not a list of texts.
            ValueError: there are no captions.
        """
        captions = listed_captions(captions)
        if not captions:
            raise ValueError("a frozen encoder needs at least one caption; got none: pass [''] for the empty caption")
        texts = list(dict.fromkeys(captions))
        rows = {text: row for row, text in enumerate(texts)}
        return {"context": self._kept(texts)[torch.tensor([rows[caption] for caption in captions])]}

    def check(self, captions: Sequence[str]) -> None:
        """Do nothing: the tokeniser of a pretrained encoder knows all words."""

    def _kept(self, texts: Sequence[str]) -> Tensor:
        """Return the features of texts, from the file in `cache` if it exists; write it otherwise."""
        if self.cache is None:
            return self.features(texts)
        name = hashlib.blake2b(json.dumps([self.digest, self.length, *texts]).encode(), digest_size=16).hexdigest()
        path = self.cache / f"{name}.npy"
        if not path.is_file():
            array = self.features(texts).numpy()

            def write(temporary: Path) -> None:
                with open(temporary, "wb") as file:
                    np.save(file, array)

            replace_atomically(path, write, array.nbytes)
        try:
            return torch.from_numpy(np.load(path, allow_pickle=False))
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path} must hold the features of captions ({error}): delete it") from error

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> Tensor:
        """Return the features (N, L, features) of texts, without reading the cache."""
        tokenizer, encoder = self._load()
        parts, cut = [], 0
        for i in range(0, len(texts), BATCH):
            part = list(texts[i : i + BATCH])
            cut += sum(len(ids) > self.length for ids in tokenizer(part)["input_ids"])
            encoded = tokenizer(
                part, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
            )
            mask = encoded["attention_mask"]
            hidden = encoder(input_ids=encoded["input_ids"], attention_mask=mask).last_hidden_state.float()
            known = mask.bool() & torch.tensor([[bool(text.strip())] for text in part])
            parts.append(hidden.masked_fill(~known[:, :, None], math.nan))
        _warn_of_cuts(cut, len(texts), self.length)
        return torch.cat(parts)

    def _load(self) -> tuple[Any, Any]:
        """Return the tokeniser and the encoder in eval mode, in float32."""
        library = package("transformers")
        options = {"local_files_only": True, "trust_remote_code": False}
        with _loading(self.folder):
            kind = library.AutoConfig.from_pretrained(self.folder, **options).model_type
            if kind not in ENCODERS:
                raise ValueError(f"its model_type is {kind!r}, and not one of {', '.join(ENCODERS)}")
            tokenizer = library.AutoTokenizer.from_pretrained(self.folder, **options)
            load = getattr(library, ENCODERS[kind]).from_pretrained
            encoder, found = load(
                self.folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            if missing := sorted(found["missing_keys"]):
                raise ValueError(f"its weights lack {len(missing)} tensors, such as {missing[0]}")
        return tokenizer, encoder.eval().requires_grad_(False)


def _read_tokenizer(file: Path) -> Any:
    """Return the tokeniser in a file; errors are those of `Tokens.tokenizer`."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no tokeniser at {file}: restore the file, or train the run again")
    library = package("tokenizers")
    try:
        return library.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain exceptions
        raise ValueError(f"{file} must be a tokeniser of `tokenizers`; {error}: restore the file") from error


def _warn_of_cuts(cut: int, count: int, length: int | None) -> None:
    if cut:
        warnings.warn(f"{cut} of {count} captions have more than length={length} tokens and are cut", stacklevel=3)


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Hide the progress bars of `transformers`, and turn its errors into a ValueError that names the folder."""
    messages = import_module("transformers.utils.logging")
    has_bars = messages.is_progress_bar_enabled()
    messages.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{folder} must have a T5 encoder or CLIP text model with weights in safetensors files; {reason}"
        ) from error
    finally:
        if has_bars:
            messages.enable_progress_bar()
