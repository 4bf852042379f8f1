"""The vision encoder: a small timm ViT, trained once by CLIP's objective on pictures and captions, then frozen.

Captions say what is there and not where. CLIP's loss alone tells colors apart within minutes, and hardly shapes; so it is taken
a second time between phrases and the patches of the things that they name, as RegionCLIP takes it of regions. What a projector
reads is the paper's choice, layer -2; the class token is dropped later, by the vision-language model.
"""

from collections.abc import Callable, Sequence
from random import Random

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional

from benchmarks.spatial_vqa.layout import GRID, cover
from benchmarks.spatial_vqa.optimization import Optimization, Pretraining
from benchmarks.spatial_vqa.splits import Example, pictures
from benchmarks.spatial_vqa.words import IDS, PAD, WORDS, encode
from spatial_tokens.demo.questions import CELL, phrase
from spatial_tokens.demo.scenes import SIDE

PATCH = CELL
HIDDEN_SIZE = 128
SHARED_SIZE = 96
LAYER = -2


def build_encoder() -> VisionTransformer:
    """A ViT with a class token, of random weights."""
    encoder = VisionTransformer(
        img_size=SIDE, patch_size=PATCH, embed_dim=HIDDEN_SIZE, depth=4, num_heads=4, mlp_ratio=3, num_classes=0
    )
    places = build_sincos2d_pos_embed([GRID, GRID], HIDDEN_SIZE)
    with torch.no_grad():
        encoder.pos_embed[:, 1:].copy_(0.5 * places)
    for block in encoder.blocks:
        block.attn.fused_attn = False  # on a CPU, in bfloat16, plain products train twice as fast
    return encoder


class TextEncoder(nn.Module):
    """Texts to vectors: a small transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(WORDS), SHARED_SIZE, padding_idx=IDS[PAD])
        layer = nn.TransformerEncoderLayer(SHARED_SIZE, 4, 2 * SHARED_SIZE, 0.0, batch_first=True, norm_first=True)
        self.position = nn.Parameter(0.02 * torch.randn(64, SHARED_SIZE))
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids `(B, L)` to their words' sum, `(B, SHARED_SIZE)`."""
        padding = ids == IDS[PAD]
        words = self.layers(self.embed(ids) + self.position[: ids.shape[1]], src_key_padding_mask=padding)
        return words.masked_fill(padding[..., None], 0).sum(1)


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

    def forward(
        self, pixels: torch.Tensor, regions: torch.Tensor, captions: torch.Tensor, phrases: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How well pictures and texts go together.

        Args:
            pixels: `(B, 3, H, W)`.
            regions: Where each thing is, `(R, B, N)`: one at a patch of its picture, zero elsewhere.
            captions: Ids `(B, L)`.
            phrases: Ids `(T, L)` of single things.

        Returns:
            Pictures and captions, `(B, B)`, by the class token; regions and phrases, `(R, T)`, by those patches.
        """
        with torch.autocast(pixels.device.type, torch.bfloat16):
            seen = self.project(self.vision.forward_features(pixels)).float()
            whole, single = (functional.normalize(self.text(each).float(), dim=-1) for each in (captions, phrases))
        inside = functional.normalize(torch.einsum("rbn, bnc -> rc", regions, seen[:, 1:]), dim=-1)
        return self.scale.exp() * functional.normalize(seen[:, 0], dim=-1) @ whole.T, self.scale.exp() * inside @ single.T


def train_encoder(
    examples: Sequence[Example], plan: Pretraining, seed: int, progress: Callable[[float], None], device: str = "cpu"
) -> VisionTransformer:
    """The encoder, trained to tell which caption goes with which picture and, as in RegionCLIP, which phrase with which thing."""
    torch.manual_seed(seed)
    random = Random(seed)
    pair = Pair().to(device)
    optimization = Optimization(pair.vision.blocks, pair, plan)
    shown = torch.from_numpy(pictures(examples))
    for _ in range(plan.steps):
        chosen = torch.randperm(len(examples))[: plan.batch_size].tolist()
        things = [(i, thing) for i, k in enumerate(chosen) for thing in examples[k].scene.things]
        phrases = sorted({phrase(thing) for _, thing in things})
        regions = torch.zeros(len(things), len(chosen), GRID * GRID)
        for number, (i, thing) in enumerate(things):
            column, row = random.choice(cover(thing))
            regions[number, i, row * GRID + column] = 1
        captions, names = as_ids([examples[k].caption for k in chosen]), as_ids(phrases)
        whole, single = pair(*(each.to(device) for each in (as_pixels(shown[chosen]), regions, captions, names)))
        target = torch.arange(len(chosen), device=device)
        which = torch.tensor([phrases.index(phrase(thing)) for _, thing in things], device=device)
        loss = functional.cross_entropy(single, which)
        loss = loss + 0.5 * (functional.cross_entropy(whole, target) + functional.cross_entropy(whole.T, target))
        optimization.step(loss)
        progress((single.argmax(1) == which).float().mean().item())
    return pair.vision.eval().requires_grad_(False)


def as_ids(texts: Sequence[str]) -> torch.Tensor:
    """Ids `(T, L)`, padded."""
    return nn.utils.rnn.pad_sequence([torch.tensor(encode(each)) for each in texts], batch_first=True)


@torch.inference_mode()
def features_of(encoder: VisionTransformer, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels `(B, 3, H, W)` to layer -2 with its class token, `(B, 1 + GRID * GRID, HIDDEN_SIZE)`."""
    depth = len(encoder.blocks)
    ((patches, prefix),) = encoder.forward_intermediates(
        pixels.to(encoder.pos_embed.device),
        indices=[depth + LAYER],
        output_fmt="NLC",
        return_prefix_tokens=True,
        intermediates_only=True,
    )
    return torch.cat([prefix, patches], dim=1)


def rolled_features_of(encoder: VisionTransformer, pixels: torch.Tensor, random: Random) -> torch.Tensor:
    """The same with wrong places: what a patch's feature says of its place is off by a shift, one for each picture.

    Each picture is rolled by so many patches down and to the right, as on a torus, and its features are rolled back.
    """
    moves = [(random.randrange(GRID), random.randrange(GRID)) for _ in pixels]
    moved = [each.roll((PATCH * down, PATCH * right), (1, 2)) for each, (down, right) in zip(pixels, moves, strict=True)]
    features = features_of(encoder, torch.stack(moved))
    maps = features[:, 1:].unflatten(1, (GRID, GRID))
    back = [each.roll((-down, -right), (0, 1)) for each, (down, right) in zip(maps, moves, strict=True)]
    return torch.cat([features[:, :1], torch.stack(back).flatten(1, 2)], dim=1)
