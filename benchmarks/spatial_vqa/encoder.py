"""The vision encoder: a small timm ViT, trained once by CLIP's objective on pictures and captions, then frozen.

Captions say what is there and not where. What a projector reads is the paper's choice: layer -2; the class token is dropped later, by
the vision-language model.
"""

from collections.abc import Callable, Sequence
from random import Random

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional

from benchmarks.spatial_vqa.optimization import Optimization, Pretraining
from benchmarks.spatial_vqa.questions import CELL
from benchmarks.spatial_vqa.scenes import PAIRS, RADII, SIDE
from benchmarks.spatial_vqa.splits import Example, pictures
from benchmarks.spatial_vqa.words import IDS, PAD, WORDS, encode

PATCH = CELL
GRID = SIDE // PATCH  # 12 x 12: half the paper's 24 x 24, each way
HIDDEN_SIZE = 128
SHARED_SIZE = 96
LAYER = -2


def build_encoder() -> VisionTransformer:
    """A ViT with a class token, of random weights."""
    encoder = VisionTransformer(img_size=SIDE, patch_size=PATCH, embed_dim=HIDDEN_SIZE, depth=4, num_heads=4, mlp_ratio=3, num_classes=0)
    places = build_sincos2d_pos_embed([GRID, GRID], HIDDEN_SIZE)
    with torch.no_grad():
        encoder.pos_embed[:, 1:].copy_(0.5 * places)
    for block in encoder.blocks:
        block.attn.fused_attn = False  # on a CPU, in bfloat16, plain products train twice as fast
    return encoder


class TextEncoder(nn.Module):
    """Captions to a vector a word: a small transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(WORDS), SHARED_SIZE, padding_idx=IDS[PAD])
        layer = nn.TransformerEncoderLayer(SHARED_SIZE, 4, 2 * SHARED_SIZE, 0.0, batch_first=True, norm_first=True)
        self.position = nn.Parameter(0.02 * torch.randn(64, SHARED_SIZE))
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids `(B, L)` to `(B, L, SHARED_SIZE)`."""
        return self.layers(self.embed(ids) + self.position[: ids.shape[1]], src_key_padding_mask=ids == IDS[PAD])


def as_pixels(found: torch.Tensor) -> torch.Tensor:
    """Pictures `(B, H, W, 3)` in uint8 to what the encoder reads, `(B, 3, H, W)` from -1 to 1."""
    return found.permute(0, 3, 1, 2).float() / 127.5 - 1


class Pair(nn.Module):
    """What is trained: both encoders, the way into their shared space, and CLIP's temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.text = build_encoder(), TextEncoder()
        self.project = nn.Linear(HIDDEN_SIZE, SHARED_SIZE, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.5))

    def forward(self, pixels: torch.Tensor, captions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels `(B, 3, H, W)` and captions `(T, L)` to how well they go together, twice `(B, T)`.

        Once as in CLIP, the class token and the mean of the words; once as in FILIP, each word and the patch that is nearest to it.
        """
        kept = (captions != IDS[PAD]).float()
        with torch.autocast("cpu", torch.bfloat16):
            seen, read = self.project(self.vision.forward_features(pixels)), self.text(captions)
        mean = (read.float() * kept[..., None]).sum(1)
        whole = functional.normalize(seen[:, 0].float(), dim=-1) @ functional.normalize(mean, dim=-1).T
        seen, read = functional.normalize(seen[:, 1:].float(), dim=-1), functional.normalize(read.float(), dim=-1)
        with torch.autocast("cpu", torch.bfloat16):
            nearest = torch.einsum("bpc, twc -> btwp", seen, read).amax(-1)
        words = (nearest.float() * kept).sum(-1) / kept.sum(-1)
        return self.scale.exp() * whole, self.scale.exp() * words


def train_encoder(examples: Sequence[Example], plan: Pretraining, seed: int, progress: Callable[[float], None]) -> VisionTransformer:
    """The encoder, trained to tell which caption goes with which picture.

    Beside the batch's captions stand as many in which one thing is another (as in NegCLIP): else colors alone would tell them apart.
    """
    torch.manual_seed(seed)
    random = Random(seed)
    pair = Pair()
    optimization = Optimization(pair.vision.blocks, pair, plan)
    shown = torch.from_numpy(pictures(examples))
    for _ in range(plan.steps):
        chosen = torch.randperm(len(examples))[: plan.batch_size].tolist()
        told = [examples[i].caption for i in chosen]
        texts = [torch.tensor(encode(each)) for each in (*told, *(altered(each, random) for each in told))]
        target = torch.arange(len(chosen))
        scores = pair(as_pixels(shown[chosen]), nn.utils.rnn.pad_sequence(texts, batch_first=True))
        losses = [functional.cross_entropy(each, target) + functional.cross_entropy(each[:, : len(chosen)].T, target) for each in scores]
        optimization.step(torch.stack(losses).sum())
        progress((scores[1].argmax(1) == target).float().mean().item())
    return pair.vision.eval().requires_grad_(False)


def altered(caption: str, random: Random) -> str:
    """The caption with one thing of another color, shape or size."""
    words = caption.split()
    at = random.randrange(0, len(words), 3)  # size, name, full stop
    color, shape = words[at + 1].split("-")
    there = {word for word in words if "-" in word}
    names = [f"{c}-{s}" for c, s in PAIRS if (c == color) != (s == shape) and f"{c}-{s}" not in there]
    if random.random() < 0.25:
        words[at] = random.choice([size for size in RADII if size != words[at]])
    else:
        words[at + 1] = random.choice(names)
    return " ".join(words)


@torch.inference_mode()
def features_of(encoder: VisionTransformer, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels `(B, 3, H, W)` to layer -2 with its class token, `(B, 1 + GRID * GRID, HIDDEN_SIZE)`."""
    depth = len(encoder.blocks)
    ((patches, prefix),) = encoder.forward_intermediates(
        pixels, indices=[depth + LAYER], output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    return torch.cat([prefix, patches], dim=1)
