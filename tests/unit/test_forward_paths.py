"""Which paths of real engines agents reach: every route of SGLang 0.5.23 and vLLM 0.30 is in one of the tables."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.contracts.errors import ConfigurationError
from gateway.routes.forward import Forward, own_path, refusal

SERVED_HERE = """
    POST /generate · POST /v1/chat/completions · POST /v1/completions
    POST /v1/messages · POST /v1/messages/count_tokens · POST /v1/responses · GET /v1/models · GET /v1/models/tiny
    GET /v1/responses/resp_1
"""
READING_AND_SCORING = """
    GET /get_model_info · GET /health · GET /model_info · GET /ping · GET /ready · GET /tokenizer_info · GET /version
    POST /classify · POST /encode · POST /parse_function_call · POST /pooling · POST /rerank · POST /score
    POST /separate_reasoning · POST /v1/audio/transcriptions · POST /v1/audio/translations
    POST /v1/chat/completions/derender · POST /v1/chat/completions/render · POST /v1/classify
    POST /v1/completions/derender · POST /v1/completions/render · POST /v1/decisions · POST /v1/embeddings
    POST /v1/messages/render · POST /v1/rerank · POST /v1/responses/render · POST /v1/score · POST /v1/systemone
    POST /v2/embed · POST /v2/rerank
"""
CONTROL_OR_UNRECORDED = """
    POST /abort_request · POST /abort_requests · POST /add_external_corpus · POST /api/chat · POST /api/generate
    POST /api/show · GET /api/tags · POST /begin_weight_update · POST /close_session · GET /close_session
    POST /cohere/v2/chat · GET /readyz · POST /generative_scoring · POST /tokenize · POST /detokenize · POST /wasm
    POST /v1/tokenizers · POST /ha/rate-limit · POST /collective_rpc · POST /configure_logging · GET /configure_logging
    POST /continue_generation · POST /destroy_weights_update_group · GET /docs · GET /docs/oauth2-redirect
    POST /dump_expert_distribution_record · POST /dumper/reset · POST /end_weight_update · POST /fault_tolerance/apply
    GET /fault_tolerance/status · POST /finish_weight_update · GET /flush_cache · POST /flush_cache · POST /freeze_gc
    POST /gate/activate · PUT /generate · GET /get_hicache_l3_cache_layout
    GET /get_remote_instance_transfer_engine_info · GET /get_server_info · GET /get_transfer_engine_info
    GET /get_weights_by_name · POST /get_weights_by_name · GET /get_world_size · GET /health_generate
    DELETE /hicache/storage-backend · GET /hicache/storage-backend · PUT /hicache/storage-backend
    POST /hicache/storage-backend/clear · POST /inference/v1/abort_requests · POST /inference/v1/generate
    POST /init_weight_transfer_engine · POST /init_weights_send_group_for_remote_instance
    POST /init_weights_update_group · POST /invocations · GET /is_paused · GET /is_scaling_elastic_ep · GET /is_sleeping
    GET /list_external_corpora · GET /load · POST /load_lora_adapter · POST /load_lora_adapter_from_tensors
    GET /metrics · POST /open_session · GET /openapi.json · POST /pause · POST /pause_generation · POST /pd_role_switch
    GET /redoc · PUT /register_transfer_engine_info · POST /release_memory_occupation
    GET /remote_instance_transfer_engine_info · POST /remove_external_corpus · POST /reset_encoder_cache
    POST /reset_mm_cache · POST /reset_prefix_cache · POST /resume · POST /resume_memory_occupation
    POST /scale_elastic_ep · POST /scheduler_receive_meta_data · POST /scheduler_receive_url · POST /send
    POST /send_weights_to_remote_instance · GET /server_info · POST /set_internal_state · PUT /set_internal_state
    POST /set_trace_level · POST /shutdown_weight_transfer_engine · POST /sleep · POST /slow_down
    POST /start_draft_weight_update · POST /start_expert_distribution_record · GET /start_profile · POST /start_profile
    POST /start_weight_update · GET /static/index.html · POST /stop_expert_distribution_record · POST /stop_profile
    POST /unload_lora_adapter · POST /update_weight_version · POST /update_weights · POST /update_weights_from_disk
    POST /update_weights_from_distributed · POST /update_weights_from_ipc · POST /update_weights_from_tensor
    POST /v1/chat/completions/batch · POST /v1/load_lora_adapter · GET /v1/loads · GET /v1/realtime
    POST /v1/responses/resp_1/cancel · POST /v1/unload_lora_adapter · POST /vertex_generate · POST /wake_up
    GET /weight_info · POST /weight_checker · POST /weights_checker
    GET /workers · POST /workers · DELETE /workers/1 · POST /v1/conversations · GET /engine_metrics · GET /ha/status
"""


def calls(table: str) -> list[str]:
    return [entry.strip() for line in table.split("\n") for entry in line.split("·") if entry.strip()]


def passes(mode: Forward, call: str, own: tuple[str, ...] = ()) -> bool:
    method, path = call.split(" ")
    return refusal(mode, method, path, own=tuple(map(own_path, own))) is None


@pytest.mark.parametrize("call", calls(READING_AND_SCORING))
def test_paths_that_read_and_score_are_forwarded_unless_nothing_is(call: str) -> None:
    assert [passes(mode, call) for mode in Forward] == [True, False]


@pytest.mark.parametrize(
    ("listed", "passing", "refused"),
    [
        ("/mine", "POST /mine · DELETE /mine", "GET /mine/a · GET /Mine · GET /mine/ · GET /%6dine · GET //mine"),
        ("/mine/", "GET /mine", "GET /mine/ · GET /mine/a"),
        ("/mine/*", "GET /mine/a · GET /mine/a/b.c", "GET /mine · GET /mines · GET /mine/../x · GET /mine/a%2fb"),
        ("/mine*", "GET /mine · GET /mines · GET /mine/a", "GET /min · GET /x/mine"),
        ("/flush_cache", "POST /flush_cache", "POST /flush_cache_2"),
    ],
)
def test_paths_of_the_operators_own_are_forwarded_as_listed(listed: str, passing: str, refused: str) -> None:
    """One that controls an engine is his decision; the known ones still pass."""
    own = (listed,)
    assert passes(Forward.KNOWN, "POST /v1/embeddings", own)
    assert all(passes(Forward.KNOWN, call, own) for call in calls(passing))
    assert not any(passes(Forward.KNOWN, call, own) for call in calls(refused))
    assert not any(passes(Forward.NONE, call, own) for call in calls(passing))


@pytest.mark.parametrize("listed", ["", "*", "/", "/*", "mine", "/a/../b", "/a//b", "/a%20b", "/a*b", "/a**", "/a//*"])
def test_a_listed_path_that_says_more_or_less_than_one_path_is_refused(listed: str) -> None:
    with pytest.raises(ConfigurationError, match="forward_paths"):
        own_path(listed)


@pytest.mark.parametrize("call", calls(CONTROL_OR_UNRECORDED))
def test_paths_that_control_an_engine_or_sample_unrecorded_are_not_forwarded(call: str) -> None:
    """I7."""
    assert [passes(mode, call) for mode in Forward] == [False, False]


@pytest.mark.parametrize("call", calls(SERVED_HERE))
def test_the_forwarder_does_not_reach_past_what_the_gateway_serves_itself(call: str) -> None:
    """I7: a call that misses its own route by a hair must not be sampled by the engine unrecorded."""
    assert [passes(mode, call) for mode in Forward] == [False, False]


disguises = st.sampled_from(["%2e%2e/", "./", "../", "//", "\\", "%2f", "%5C", ";x=1/", "%25", "%00", " ", "\u2215"])


@settings(max_examples=300)
@given(
    call=st.sampled_from(calls(CONTROL_OR_UNRECORDED)),
    disguise=disguises,
    escaped=st.integers(0, 40),
    upper=st.booleans(),
)
def test_no_disguise_brings_a_control_path_past(call: str, disguise: str, escaped: int, upper: bool) -> None:
    """Escapes, case, dots, doubled and foreign slashes: what two servers might read as two paths does not pass."""
    method, path = call.split(" ")
    letter = path[1 + escaped % (len(path) - 1)]
    for disguised in (
        path.replace(letter, f"%{ord(letter):02x}"),
        path.replace("/", f"/{disguise}"),
        f"/v1/embeddings/..{path}",
        f"/{path}",
        f"{path}/",
        path.upper() if upper else path.title(),
        f"/v1/embeddings/%2e%2e{path}",
    ):
        assert all(refusal(mode, method, disguised) is not None for mode in Forward), disguised
