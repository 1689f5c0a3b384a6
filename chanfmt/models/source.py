"""A model's files: where they lie, and what is known of them, read once and passed on."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from chanfmt.base.errors import ModelError, first_line
from chanfmt.base.hub_ids import is_commit, is_hub_id
from chanfmt.base.inputs import file_size, input_path
from chanfmt.models import quantised
from chanfmt.models.beside import check_adapter_alone, check_alone
from chanfmt.models.own import is_own, parse_own
from chanfmt.models.quiet import quiet_transformers
from chanfmt.models.safetensors import CheckpointIndex, fingerprint

if TYPE_CHECKING:
    from collections.abc import Mapping

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_DIRECTORY = "additional_chat_templates"
"""The only subdirectory of a model's directory that belongs to the model: the tokenizer's named chat templates lie there."""
CONFIG_FILE = "config.json"
_MAX_CONFIG = 16 << 20


class Named(Protocol):
    """The fields that identify a model, in an atlas (`chanfmt.format.records.ModelRecord`) and in a pruning plan alike."""

    @property
    def id(self) -> str: ...
    @property
    def revision(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...


class ModelSource:
    """A model's files: where they lie, and what they say. Each file is read once, when something in it is first needed.

    `chanfmt.hub.locate.locate_model` makes one from what a user writes.

    Attributes:
        directory: Local directory with config, weights and tokenizer.
        id: Hub id, or the name of the directory or GGUF file.
        revision: Commit on the Hub; empty for a model that is not from the Hub.
        source: ``hub``, ``local`` or ``gguf``.
        trust_remote_code: Whether code from the model's repository may run.
        loaded: The model itself, if it is in memory already (`chanfmt.models.memory`); otherwise None.
        file: The ``.gguf`` file that ``directory`` was made from; None for other sources.
    """

    loaded: Any = None
    file: Path | None = None

    def __init__(
        self, directory: Path, id: str = "", revision: str = "", source: str = "local", *, trust_remote_code: bool = False
    ) -> None:
        self.directory = Path(directory)
        self.id = id or self.directory.resolve().name
        self.revision = revision
        self.source = source
        self.trust_remote_code = trust_remote_code

    def __repr__(self) -> str:
        at = f" at {self.revision[:12]}" if self.revision else ""
        return f"<ModelSource {self.id!r}{at} in {str(self.directory)!r}>"

    @functools.cached_property
    def index(self) -> CheckpointIndex:
        """The checkpoint's tensors, from the headers of its files. Raises `ModelError`."""
        return CheckpointIndex.open(self.directory)

    @functools.cached_property
    def fingerprint(self) -> str:
        """`chanfmt.models.safetensors.fingerprint` of the checkpoint. Raises `ModelError`."""
        return fingerprint(self.index)

    @functools.cached_property
    def config_text(self) -> str:
        """Content of ``config.json``. Raises `ModelError` if it cannot be read."""
        path = self.directory / CONFIG_FILE
        if not path.is_file() and self.directory.is_dir():
            check_adapter_alone(self.directory, self.id)
        try:
            if file_size(path) > _MAX_CONFIG:
                raise ModelError(f"{path} is larger than {_MAX_CONFIG >> 20} MB")
            return path.read_text(encoding="utf-8")
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}") from None
        except ValueError as error:
            raise ModelError(f"{path} is not valid JSON: {error}") from None

    @functools.cached_property
    def config_fields(self) -> dict[str, Any]:
        """The fields of ``config.json`` as parsed JSON. Raises `ModelError` if it is not a JSON object."""
        path = self.directory / CONFIG_FILE
        try:
            config = json.loads(self.config_text)
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(config, dict):
            raise ModelError(f"{path} is not a JSON object")
        return config

    @functools.cached_property
    def config(self) -> Any:
        """The config object of transformers.

        Raises:
            ModelError: The model type is unknown, the model needs code from its repository and ``trust_remote_code`` is off,
                the weights are quantised, or an adapter lies beside them.
        """
        check_alone(self.directory, self.config_fields, self.id)
        quantised.check_config(self.config_fields, self.id)
        quantised.check_files(self.directory, self.id)
        with quiet_transformers():
            try:
                config = self._parsed_config()
            except ModelError:
                raise
            # A config is free-form JSON, so transformers may raise anything over it.
            except Exception as error:
                text = first_line(error)
                if "trust_remote_code" in str(error):
                    raise ModelError(
                        f"{self.id} needs code from its repository",
                        hint="read that code; atlas build runs it with --trust-remote-code, and no other command does",
                    ) from None
                raise ModelError(f"{self.id}: transformers cannot read its config: {text}") from None
        return config

    def _parsed_config(self) -> Any:
        """The config object of `config_fields`, as ``AutoConfig.from_pretrained`` makes it.

        transformers reads the file again only if the file holds something that needs more than the class of its model
        type: code from the repository, another file's name, a number that JSON does not have.
        """
        import transformers

        fields = self.config_fields
        if is_own(fields) and not self.trust_remote_code:
            return parse_own(fields, lambda kind: kind.from_dict(copy.deepcopy(fields), name_or_path=str(self.directory)))
        kind = fields.get("model_type")
        plain = (
            isinstance(kind, str)
            and kind in transformers.CONFIG_MAPPING
            and not fields.keys() & {"auto_map", "configuration_files"}
            and '"__float__"' not in self.config_text
            and not (kind == "mistral" and "layer_types" in fields)
        )
        if not plain:
            return transformers.AutoConfig.from_pretrained(self.directory, trust_remote_code=self.trust_remote_code)
        return transformers.CONFIG_MAPPING[kind].from_dict(copy.deepcopy(fields), name_or_path=str(self.directory))

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises `ModelError` if it has none."""
        import transformers

        # With both files there, transformers takes tekken.json if mistral-common is installed, and tokenizer.json if not.
        both = all((self.directory / name).is_file() for name in ("tekken.json", TOKENIZER_FILE))
        extra = {"mistral_format": False} if both else {}
        with quiet_transformers():
            try:
                return transformers.AutoTokenizer.from_pretrained(
                    self.directory, trust_remote_code=self.trust_remote_code, **extra
                )
            except Exception as error:
                raise ModelError(
                    f"{self.id} has no tokenizer that transformers can load: {first_line(error)}",
                    hint="save the tokenizer into the same directory; for a model of images or sound, give a file of its inputs: "
                    "--calib FILE.npz",
                ) from None


def check_plain(source: ModelSource) -> None:
    """Refuse a model whose weights are not the plain numbers of its safetensors files. No weights are read.

    Everything that measures or cuts a model calls this first.

    Raises:
        ModelError: The weights are quantised, an adapter or other weights lie beside them, or a file cannot be read.
    """
    check_alone(source.directory, source.config_fields, source.id)
    quantised.check_config(source.config_fields, source.id)
    quantised.check_files(source.directory, source.id)
    quantised.check_tensors(source.index.tensors, source.id)


def own_code(fields: Mapping[str, Any]) -> str:
    """Why a model with these ``config.json`` fields cannot be cut, if its type is defined by its own code; otherwise empty."""
    import transformers

    kind = fields.get("model_type")
    if "auto_map" not in fields or is_own(fields) or (isinstance(kind, str) and kind in transformers.CONFIG_MAPPING):
        return ""
    return (
        f"code in the model's repository defines the model type {kind!r}, and a result has to load with stock transformers, "
        "without that code"
    )


def local_source(model: str, *, trust_remote_code: bool = False) -> ModelSource | None:
    """The local directory or ``.gguf`` file called ``model``; None if this machine has no file of that name.

    Raises:
        ModelError: There is a file of that name, and it is not a model.
    """
    if not check_local(model):
        return None
    path = input_path(model)
    if path.suffix == ".gguf":
        from chanfmt.models.gguf import dequantized_directory

        source = ModelSource(dequantized_directory(path), path.name, "", "gguf", trust_remote_code=trust_remote_code)
        source.file = path
        return source
    return ModelSource(path, trust_remote_code=trust_remote_code)


def check_local(model: str) -> bool:
    """Whether this machine has a model called ``model``, a directory or a ``.gguf`` file. No weight is read.

    Raises:
        ModelError: There is a file of that name, and it is not a model; or the name can only be that of a missing file.
    """
    if not model.strip():
        raise ModelError("the name of the model is empty", hint=_KINDS)
    path = input_path(model)
    if not is_local(path):
        if model.startswith(("~", ".", "/")) or model.endswith("/") or model.count("/") > 1:
            raise ModelError(f"the directory {model!r} does not exist", hint=_KINDS)
        if path.suffix in _FILES:
            raise ModelError(f"the file {model} does not exist, and it would not be a model", hint=_KINDS)
        return False
    if path.suffix == ".gguf" and not path.is_file():
        if path.is_dir():
            raise ModelError(f"{model} is a directory", hint="name the .gguf file in it")
        raise ModelError(f"the GGUF file {model} does not exist")
    if path.suffix == ".gguf":
        return True
    if not path.is_dir():
        raise ModelError(f"{model} is {_kind_of(path)}, not a model", hint=_KINDS)
    if not (path / CONFIG_FILE).is_file():
        check_adapter_alone(path, model)
        raise ModelError(f"the directory {model} has no config.json, so it is not a transformers model", hint=_beside(path))
    return True


_KINDS = "a model is a directory with config.json and safetensors files, a .gguf file, or a Hub id"
_FILES = (".h5", ".hdf5", ".safetensors", ".json", ".bin", ".pt", ".pth")
"""Suffixes of files that people name in place of the model that such a file belongs to."""


def _kind_of(path: Path) -> str:
    """What the file ``path`` seems to be."""
    if path.suffix in (".h5", ".hdf5"):
        return "an HDF5 file, such as an atlas"
    if path.suffix == ".safetensors":
        return "one file of tensors, such as a plan or a part of a checkpoint"
    return "a file"


def _beside(path: Path) -> str:
    """How to name the model that a directory without ``config.json`` seems to hold."""
    try:
        # An importance matrix is a GGUF file too.
        gguf = sorted(item.name for item in path.iterdir() if item.suffix == ".gguf" and "imatrix" not in item.name)
        inside = sorted(item.name for item in path.iterdir() if (item / CONFIG_FILE).is_file())
    except OSError:
        return _KINDS
    if gguf:
        return f"name the .gguf file in it: {path / gguf[0]}"
    return f"name the directory in it: {path / inside[0]}" if inside else _KINDS


def is_local(path: Path) -> bool:
    """Whether ``path`` names something on this machine. A ``.gguf`` file does, even if it is missing. Raises `ModelError`."""
    try:
        return path.suffix == ".gguf" or path.exists()
    except OSError as error:
        raise ModelError(f"{path} cannot be opened: {error.strerror}") from None


def own_revision(model: str, record: Named) -> str | None:
    """The commit in ``record``, if ``model`` is the Hub id in ``record`` and not a local file; otherwise None."""
    same = record.source == "hub" and model == record.id and is_hub_id(model) and not Path(model).exists()
    return record.revision if same and is_commit(record.revision) else None
