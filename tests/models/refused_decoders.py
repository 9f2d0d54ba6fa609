"""Decoders of transformers that are refused, and why; those that only run; those not tried."""

from __future__ import annotations

# The release that the lists are of.
TRANSFORMERS = "5.24.0"
# Type -> the reason, or its beginning.
REFUSED: dict[str, str] = {
    "AXK2ForCausalLM": "its indexed_attention layers need more than a KV cache",
    "BailingHybridForCausalLM": "its linear_attention layers need more than a KV cache",
    "BartForCausalLM": "too many values to unpack (expected 4)",
    "BigBirdForCausalLM": "unsupported operand type(s) for +: 'Tensor' and '_Mask'",
    "CpmAntForCausalLM": "its attention cannot be replaced",
    "DeepseekV32ForCausalLM": "its indexed_attention layers need more than a KV cache",
    "DeepseekV4ForCausalLM": "its heavily_compressed_attention layers need more than a KV cache",
    "DogeForCausalLM": "'_Mask' object has no attribute 'dtype'",
    "Dots3NoteForCausalLM": "its indexed_attention layers need more than a KV cache",
    "GPTNeoXJapaneseForCausalLM": "its attention cannot be replaced",
    "GitForCausalLM": "its attention cannot be replaced",
    "GlmMoeDsaForCausalLM": "its indexed_attention layers need more than a KV cache",
    "HYV4ForCausalLM": "its indexed_attention layers need more than a KV cache",
    "InklingForCausalLM": "its hybrid_sliding layers need more than a KV cache",
    "JetMoeForCausalLM": "qkv must be",
    "LaraMiniForCausalLM": "its linear_attention layers need more than a KV cache",
    "LongcatFlashForCausalLM": "The size of tensor a (4) must match the size of tensor b (32) at non-singleton dimension 3",
    "MBartForCausalLM": "too many values to unpack (expected 4)",
    "MegatronBertForCausalLM": "unsupported operand type(s) for +: 'Tensor' and '_Mask'",
    "MusicgenForCausalLM": "it takes no positions",
    "MusicgenMelodyForCausalLM": "it takes no positions",
    "MvpForCausalLM": "its attention cannot be replaced",
    "OpenAIGPTLMHeadModel": "over a paged cache it computes something else",
    "ProphetNetForCausalLM": "its attention cannot be replaced",
    "Qwen4ExpForCausalLM": "its linear_attention layers need more than a KV cache",
    "RecurrentGemmaForCausalLM": "its linear_attention layers need more than a KV cache",
    "RemBertForCausalLM": "unsupported operand type(s) for +: 'Tensor' and '_Mask'",
    "RoFormerForCausalLM": "unsupported operand type(s) for +: 'Tensor' and '_Mask'",
    "RwkvForCausalLM": "its attention cannot be replaced",
    "TrOCRForCausalLM": "its attention cannot be replaced",
    "XGLMForCausalLM": "its attention cannot be replaced",
    "XLMWithLMHeadModel": "over a paged cache it computes something else",
    "XLNetLMHeadModel": "config: max_position_embeddings must be positive, not -1",
    "XmodForCausalLM": "Input language unknown. Please call `XmodPreTrainedModel.set_default_language()`",
    "xLSTMForCausalLM": "its attention cannot be replaced",
}
# They pass the comparison with themselves, and are proven by no test.
UNPROVEN: tuple[str, ...] = (
    "BlenderbotForCausalLM",
    "BlenderbotSmallForCausalLM",
    "DoryForCausalLM",
    "HrmTextForCausalLM",
    "MarianForCausalLM",
)
# Their tiny models need sizes of their own.
OTHER_SIZES: tuple[str, ...] = (
    "BltForCausalLM",
    "CohereCompassForCausalLM",
    "DbrxForCausalLM",
    "FuyuForCausalLM",
    "Gemma4AssistantForCausalLM",
    "Gemma4UnifiedAssistantForCausalLM",
    "Inkling2ForCausalLM",
    "Inkling2LoopForCausalLM",
    "PLBartForCausalLM",
    "Phi4MultimodalForCausalLM",
    "WhisperForCausalLM",
    "Zamba2ForCausalLM",
    "ZambaForCausalLM",
    "ZayaForCausalLM",
)
