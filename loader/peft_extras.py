"""What a PEFT file holds of a linear layer beside its pair: a magnitude of DoRA, a trained bias.

| tensor                                                       | stands for                        |
|--------------------------------------------------------------|-----------------------------------|
| ``base_model.model.<path>.lora_magnitude_vector`` ``[out]``, | DoRA's ``m``, of every targeted   |
| or ``….lora_magnitude_vector.weight``                        | module with ``use_dora``          |
| ``base_model.model.<path>.base_layer.bias`` ``[out]``        | a trained bias in the place of    |
|                                                              | the base's, with ``bias`` ``all`` |
|                                                              | or ``lora_only``                  |
| ``base_model.model.<path>.bias`` ``[out]``                   | the same of a module that is not  |
|                                                              | targeted, with ``all``            |

PEFT writes the base's bias as it was trained, where the base has one. One that is missing leaves
the base's as it is, as in PEFT. An image has a bias beside a pair alone, so a module that is not
targeted gets a pair of zeros.

Source: ``get_peft_model_state_dict`` and ``_load_from_state_dict`` of PEFT 0.21.
"""

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass

from ipc.base_model import LinearShape
from ipc.errors import AdapterInvalid
from loader.floats import FLOAT_DTYPES
from loader.peft_config import PeftConfig
from loader.peft_files import CONFIG_NAME
from loader.plan import LinearDerivation
from loader.scales import StoredTensor
from loader.strict_json import shorten

_MAGNITUDE = re.compile(r"base_model\.model\.(.+)\.lora_magnitude_vector(?:\.weight)?")
_BIAS = re.compile(r"base_model\.model\.(.+)\.base_layer\.bias")
_LONE_BIAS = re.compile(r"base_model\.model\.(.+)\.bias")


@dataclass(frozen=True, slots=True)
class Extras:
    """Magnitudes and trained biases by the paths of their modules, whatever these are.

    ``lone_biases`` are those that are named as if their module had no pair.
    """

    magnitudes: dict[str, StoredTensor]
    biases: dict[str, StoredTensor]
    lone_biases: dict[str, StoredTensor]

    @classmethod
    def gather(cls, tensors: Iterable[StoredTensor]) -> tuple["Extras", list[StoredTensor]]:
        """What there is among ``tensors``, and those that are none of it.

        Raises:
            AdapterInvalid: a module has two magnitudes.
        """
        magnitudes: dict[str, StoredTensor] = {}
        biases: dict[str, StoredTensor] = {}
        lone_biases: dict[str, StoredTensor] = {}
        others = []
        for stored in tensors:
            if match := _MAGNITUDE.fullmatch(stored.tensor.name):
                if match[1] in magnitudes:
                    raise AdapterInvalid(
                        f"{stored.file_name}: tensor {shorten(stored.tensor.name, 160)} is the"
                        " second magnitude of its module"
                    )
                magnitudes[match[1]] = stored
            elif match := _BIAS.fullmatch(stored.tensor.name):
                biases[match[1]] = stored
            elif match := _LONE_BIAS.fullmatch(stored.tensor.name):
                lone_biases[match[1]] = stored
            else:
                others.append(stored)
        return cls(magnitudes, biases, lone_biases), others

    def derivation(
        self, config: PeftConfig, stage: int, path: str, shape: LinearShape, where: str
    ) -> LinearDerivation | None:
        """What is derived for the targeted linear at ``path``, if anything.

        ``where`` names the adapter's file.

        Raises:
            AdapterInvalid: a tensor is missing, misshapen, or contradicts the configuration.
        """
        magnitude, bias = self.magnitudes.get(path), self.biases.get(path)
        short_path = path.removeprefix("model.")
        if magnitude is not None:
            _check(magnitude, shape)
            if not config.use_dora:
                raise AdapterInvalid(
                    f"{CONFIG_NAME}: use_dora is not true, but {magnitude.file_name} has a"
                    f" lora_magnitude_vector of {short_path}",
                    param="use_dora",
                )
        elif config.use_dora:
            raise AdapterInvalid(
                f"{short_path} is targeted by {CONFIG_NAME}, whose use_dora is true, but {where}"
                " has no lora_magnitude_vector of it"
            )
        if bias is not None:
            if config.bias == "none":
                raise unexpected_bias(bias, config)
            _check_bias(bias, shape, short_path)
        if bias is None and not config.use_dora:
            return None
        return LinearDerivation(
            stage, shape.name, path, config.scaling_of(path), magnitude, bias, shape.has_bias
        )

    def lone_derivation(
        self, config: PeftConfig, stage: int, path: str, shape: LinearShape
    ) -> LinearDerivation | None:
        """What is derived for the linear at ``path``, which is not targeted, if anything.

        Raises:
            AdapterInvalid: its bias is misshapen, or contradicts the configuration.
        """
        bias = self.lone_biases.get(path)
        if bias is None:
            return None
        if config.bias != "all":
            raise unexpected_bias(bias, config)
        _check_bias(bias, shape, path.removeprefix("model."))
        return LinearDerivation(stage, shape.name, path, 0.0, None, bias, shape.has_bias)

    def of_others(self, targeted: Container[str], linears: Container[str]) -> list[StoredTensor]:
        """Those that none of the ``linears`` can have, or not as they are named."""
        beside_pairs = (*self.magnitudes.items(), *self.biases.items())
        others = [each for path, each in beside_pairs if path not in targeted]
        return others + [
            each
            for path, each in self.lone_biases.items()
            if path in targeted or path not in linears
        ]


def unexpected_bias(stored: StoredTensor, config: PeftConfig) -> AdapterInvalid:
    """Why a bias can not be served."""
    return AdapterInvalid(
        f"{CONFIG_NAME}: bias is {config.bias!r}, and {stored.file_name} holds the bias"
        f" {shorten(stored.tensor.name, 160)}; expected, with 'all' or 'lora_only', <module>."
        "base_layer.bias of targeted linear layers, and with 'all' <module>.bias of others",
        param="bias",
    )


def _check_bias(stored: StoredTensor, shape: LinearShape, path: str) -> None:
    _check(stored, shape)
    if not shape.has_bias:
        raise AdapterInvalid(
            f"{stored.file_name}: tensor {shorten(stored.tensor.name, 160)} is a trained bias, but"
            f" the base has none in {path}"
        )


def _check(stored: StoredTensor, shape: LinearShape) -> None:
    tensor = stored.tensor
    if tensor.shape != (shape.out_features,) or tensor.dtype not in FLOAT_DTYPES:
        expected = ", ".join(dtype.value for dtype in FLOAT_DTYPES)
        raise AdapterInvalid(
            f"{stored.file_name}: tensor {shorten(tensor.name, 160)}: expected one of {expected} in"
            f" {[shape.out_features]}, got {tensor.dtype.value} in {list(tensor.shape)}"
        )
