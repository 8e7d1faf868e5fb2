"""ClipEncoder: a clip's pixels and caption -> the tensors of one record."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import torch

from megacogvx.curation.clip_list import ClipList
from megacogvx.curation.clip_source import ReadClip
from megacogvx.curation.encode_job import EncodeJob
from megacogvx.data.clips import Clip, read_clip
from megacogvx.data.indexed.encoder_info import FloatDtype, TextDtype, TextKind
from megacogvx.data.indexed.fields import to_field
from megacogvx.data.transforms import to_model_range
from megacogvx.errors import DataError
from megacogvx.models.text_encoder import TextEncoder
from megacogvx.models.vae.model import CogVideoXVAE
from megacogvx.models.vae.tiling import WHOLE, Coding
from megacogvx.models.weights import weights_fingerprint
from megacogvx.parallel.frame_parallel import ALONE, FrameHelpers, gather_frames, latent_frames_of, shard_pixels

KEPT_CAPTIONS = 256  # embeddings kept for rows that repeat a caption; 0.5 GB at 226 tokens of width 4096


class Fields(TypedDict):
    """The tensors of one record, as `DatasetWriter.add_item` takes them."""

    latents: torch.Tensor
    text: torch.Tensor
    first_frame: torch.Tensor | None


@dataclass
class ClipEncoder:
    """A VAE and a text encoder, and how they are applied.

    Attributes:
        vae: maps video_BCTHW in [-1, 1] to moments_B2CTHW.
        text_encoder: maps captions to embeddings_BLE.
        text_kind: "padded": a record holds all L embeddings; "real": only those of the caption's own tokens;
            "token_ids": no embedding, but the ids of the padded caption.
        coding: how much the VAE encodes at once.
        latent_dtype, embedding_dtype: how values are stored.
        first_frame: whether records hold the clip's first frame as pixels.
        read: gives a clip's pixels.
        helpers: the ranks that encode each clip together; all of them call the same functions in the same order.
    """

    vae: CogVideoXVAE
    text_encoder: TextEncoder
    text_kind: TextKind = "padded"
    coding: Coding = WHOLE
    latent_dtype: FloatDtype = "bf16"
    embedding_dtype: FloatDtype = "bf16"
    first_frame: bool = False
    read: ReadClip = read_clip
    helpers: FrameHelpers = ALONE
    _texts: OrderedDict[str, torch.Tensor] = field(default_factory=OrderedDict, init=False)

    @property
    def text_dtype(self) -> TextDtype:
        """What texts are stored as."""
        return "int32" if self.text_kind == "token_ids" else self.embedding_dtype

    @torch.no_grad()
    def moments(self, clip: Clip) -> torch.Tensor:
        """Encode a clip's pixels: moments [T, h, w, 2C] of `latent_dtype` on the CPU, mean then log-variance.

        Raises:
            DataError: the clip can't be read, its size doesn't suit the VAE, or the moments aren't finite.
        """
        parameter = next(self.vae.parameters())
        pixels_THW3 = self.pixels(clip)
        video_BCTHW = to_model_range(pixels_THW3)[None].to(parameter.device, parameter.dtype)
        try:
            moments_B2CTHW = self._encoded(video_BCTHW)
        except DataError as error:
            raise DataError(f"clip {clip.path}: {error}") from None
        if not bool(moments_B2CTHW.isfinite().all()):
            raise DataError(f"clip {clip.path}: the VAE makes NaN or infinity of it in {parameter.dtype}")
        return to_field(moments_B2CTHW[0].permute(1, 2, 3, 0), self.latent_dtype)

    def pixels(self, clip: Clip, count: int | None = None) -> torch.Tensor:
        """Return the first `count` frames of a clip (None: all): uint8 `[T, H, W, 3]`.

        Raises:
            DataError: this rank or one of its helpers can't read it; then all of them raise.
        """
        pixels_THW3, problem = None, ""
        try:
            pixels_THW3 = self.read(clip, count=count)
        except DataError as error:
            problem = str(error)
        problem = next(filter(None, self.helpers.gather(problem)), "")
        if problem or pixels_THW3 is None:
            raise DataError(problem)
        return pixels_THW3

    def _encoded(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        frames, ratio, group = video_BCTHW.shape[2], self.vae.config.temporal_compression_ratio, self.helpers.group
        # An image, or a clip of fewer latent frames than ranks, is encoded by each of them: nobody has to wait.
        if group is None or latent_frames_of(frames, ratio) < group.size():
            return self.vae.encode(video_BCTHW, self.coding)
        shard = shard_pixels(frames, ratio, group)
        return gather_frames(self.vae.encode(shard.cut(video_BCTHW), self.coding, shard), group)

    def texts(self, captions: Sequence[str]) -> list[torch.Tensor]:
        """Encode captions, skipping those among the last `KEPT_CAPTIONS` distinct ones.

        Returns:
            Per caption [L, E], or ids [L], of `text_dtype`, on the CPU.

        Raises:
            DataError: an embedding isn't finite.
        """
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._texts]
        if new:
            encode = self.text_encoder.token_ids if self.text_kind == "token_ids" else self.text_encoder.encode
            texts_B, lengths_B = encode(new)
            for caption, text, length in zip(new, texts_B, lengths_B.tolist(), strict=True):
                if text.is_floating_point() and not bool(text.isfinite().all()):
                    raise DataError(f"the text encoder makes NaN or infinity of {caption!r} in {text.dtype}")
                kept = text[:length] if self.text_kind == "real" else text
                self._texts[caption] = to_field(kept, self.text_dtype)
        texts = [self._texts[caption] for caption in captions]
        while len(self._texts) > KEPT_CAPTIONS:
            self._texts.popitem(last=False)
        return texts

    def job(self, clips: ClipList, clips_per_shard: int, scaling_factor: float | None, measured: int) -> EncodeJob:
        """Describe the job; `scale` stays None where it has to be measured on `measured` clips."""
        return EncodeJob(
            clips=clips.checksum(),
            clips_per_shard=clips_per_shard,
            text_kind=self.text_kind,
            text_length=self.text_encoder.max_length,
            text_width=self.text_encoder.width,
            text_encoder_fingerprint=self.text_encoder.fingerprint,
            latent_channels=self.vae.config.latent_channels,
            vae_fingerprint=weights_fingerprint(self.vae),
            coding=str(self.coding),
            scale=scaling_factor,
            measured_clips=0 if scaling_factor is not None else min(measured, len(clips)),
            latent_dtype=self.latent_dtype,
            text_dtype=self.text_dtype,
            first_frame=self.first_frame,
        )
