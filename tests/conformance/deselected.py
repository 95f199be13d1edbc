"""Which of PEFT's tests are not run, or end with an expected error, and why.

The patterns are shell-like (`[[]` is a bracket), of `Class::test[row]`.
"""

from __future__ import annotations

from peft_sensi import SensiError


ANOTHER_METHOD = "is about another method: it builds that method's config itself, or looks at its parameters by name"
NO_FIELD = "needs a field that SensiConfig does not have (`bias`, `layers_to_transform`, LoRA's `runtime_config`)"
OTHER_TARGETS = "targets an embedding, a convolution or multi-head attention; only Linears can be targeted"
FLOAT32 = "wants trained values in the base's 16-bit dtype; ours are float32 whatever the base's, for stable training"
OWN_COPY = (
    "wants the adapter to keep the config object it is given; ours keeps a copy, so that one can wrap two models"
)
CHANGED_BASE = "wants the wrapped model to begin with the base's outputs; what is trimmed is gone from the start"
TRAINS_MORE = "wants no gradients outside replaced layers; with a trimming budget the norms are trained as well"
SEVERAL_SAVED = "is skipped by PEFT itself for each method: modules that are saved whole can't be active twice"
STOCK_LOADER = "its last step is stock `from_pretrained` of a merged model, which refuses smaller matrices"
PICKLE = "writes `adapter_model.bin`; only safetensors files are written and read"
NO_HUB = "needs data, a tokenizer or a model of the Hub"

DESELECTED: dict[str, tuple[str, ...]] = {
    ANOTHER_METHOD: (
        "TestConfig::test_from_peft_type",  # all members of PEFT's own enum, which an outside method can't join
        "TestConfig::test_*adalora*",
        "TestConfig::test_*ia3*",
        "TestConfig::test_*lora*",
        "TestConfig::test_prompt_encoder_*",
        "TestCustom::test_add_weighted_adapter_*",
        "TestCustom::test_disable_adapter_with_bias_warns*",
        "TestCustom::test_*dora*",
        "TestCustom::test_*glora*",
        "TestCustom::test_*gralora*",
        "TestCustom::test_*ia3*",
        "TestCustom::test_lora_*",
        "TestCustom::test_merge_with_lora_bias_*",
        "TestCustom::test_*monteclora*",
        "TestCustom::test_multiple_adapters_*_merging_adapters*",  # `add_weighted_adapter` of LoRA and IA3
        "TestCustom::test_*pvera*",
        "TestCustom::test_*trainable_token*",
        "TestCustom::test_add_adapter_rejects_duplicate_name_without_mutation[[]True]",  # PeftMixedModel: a fixed list
        "TestDecoder::test_*adalora*",
        "TestDecoder::test_*lora_embed_scale*",
        "TestDecoder::test_lora_layer_replication",
        "TestDecoder::test_*mixed_adapter_batches*",  # several adapters in one batch: LoRA only, ours raises
        "TestDecoder::test_prefix_tuning_*",
        "TestDecoder::test_prompt_*",
        "TestDecoder::test_set_requires_grad_prompt_learning_raises*",
        "TestDecoder::test_training_prompt_learning_tasks*",
        "TestDecoder::test_weighted_combination_of_adapters*",
        "TestFeatureExtraction::test_passing_input_embeds_works*",  # skipped by PEFT itself but for prompt learning
        "TestFeatureExtraction::test_training_prompt_learning_tasks*",
        "TestFeatureExtraction::test_weighted_combination_of_adapters*",
        "TestRequiresGrad::test_loading_adapter_preserves_custom_requires_grad",
        "TestRequiresGrad::test_*trainable_token*",
        "TestRequiresGrad::test_*trainble_token*",
        "TestRequiresGrad::test_requires_grad_*_conv?d",
        *(
            f"TestRequiresGrad::test_requires_grad_{name}_*"
            for name in "ia3 adalora loha lokr oft hra miss boft lntuning vera pvera randlora vblora fourierft".split()
        ),
        "TestSequenceClassification::test_prompt_*",
        "TestSeveralActive::test_*dora*",
        "TestStateDict::test_base_model_module_named_like_peft_prefix*",
        "TestStateDict::test_*_removes_adapter_name_when_same_as_module_name",  # `sensi_plan` belongs to no module
    ),
    SEVERAL_SAVED: ("TestCustom::test_active_adapter[[]*-saved*",),
    NO_FIELD: (
        "*::test_adding_multiple_adapters_with_bias_raises*",
        "TestConfig::test_config_layers_to_transform_index_zero*",
        "TestConfig::test_save_pretrained_with_runtime_config*",
        "TestDecoder::test_training_decoders_layer_indexing*",
        "TestFeatureExtraction::test_training_layer_indexing*",
        "TestFsdp::*_learnable_bias*",
    ),
    OTHER_TARGETS: (
        "TestCustom::test_load_resized_embedding_ignore_mismatched_sizes",
        "TestCustom::test_mha_gradients_set_correctly*",
        "TestCustom::test_save_pretrained_targeting_lora_to_embedding_layer*",
        "TestCustom::test_unload_adapter_multihead_attention",
        "TestDecoder::test_merge_and_unload_fixes_tie_word_embeddings_config",
        "TestDecoder::test_save_pretrained_targeting_lora_to_embedding_layer*",
    ),
    FLOAT32: (
        "*::test_add_adapter_no_autocast_adapter_dtype*",
        "TestCustom::test_adapter_dtype_autocast[[]*-False-dtype[01]-*",
    ),
    OWN_COPY: ("*::test_from_pretrained_config_construction*",),
    CHANGED_BASE: (
        "TestCustom::test_disable_adapters[[]trim-*",
        "TestCustom::test_disable_adapters_with_merging[[]trim-*",
    ),
    TRAINS_MORE: (
        "TestDecoder::test_training_decoders_gradient_checkpointing[[]*-trim-norms-*",
        "TestFeatureExtraction::test_training_gradient_checkpointing[[]*-trim-norms-*",
    ),
    NO_HUB: ("TestConfig::test_from_pretrained_cache_dir_remote",),
}

# Everything that these check before the error must hold; the error itself is ours, or follows from what trimming is.
EXPECTED_ERRORS: dict[str, tuple[type[Exception], str]] = {
    "Test*::test_save_pretrained*_pickle*": (SensiError, PICKLE),
    "TestConfig::test_from_pretrained_sanity_check*": (SensiError, "wants PEFT's TypeError for a file of other keys"),
    "TestCustom::test_adapter_name_makes_no_difference*": (AssertionError, "marks of plans hold the adapter's name"),
    "TestCustom::test_active_adapter[[]trim-*": (SensiError, "adapters that trim can't be active together"),
    "TestDecoder::test_merge_layers_multi[[]trim*": (SensiError, "adapters that trim can't be active together"),
    "TestDecoder::test_merge_layers[[]trim*-opt]": (RuntimeError, STOCK_LOADER),
    "TestDecoder::test_merge_layers[[]trim*-transposed]": (RuntimeError, STOCK_LOADER),
    "TestFeatureExtraction::test_merge_layers[[]trim*": (RuntimeError, STOCK_LOADER),
}
