"""What the gateway counts, as Prometheus reads it."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from gateway.contracts.generation import FinishReason, JsonValue
from gateway.contracts.ports import Ledger
from gateway.contracts.records import MatchTier, SegmentReason
from gateway.ledger.reserve import Space, SpaceState
from gateway.replicas.continuation import Generated
from gateway.replicas.pool import Interruption, ReplicaPool
from gateway.sessions.turn import TurnFinished, TurnTimes
from gateway.tito.prompt import AuditCounts

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_MOST_CONSUMERS = 100
_SUMMED_TYPES = ("counter", "histogram")
_SUMMED_GAUGES = ("verbatim_certificate_audits", "verbatim_certificate_alarms")


_TurnLabels: TypeAlias = tuple[FinishReason, MatchTier, SegmentReason | None, str | None, str, bool]
"""How a turn ended, how it was found, why it opened a segment, why it may not be trained, how its prompt was certified,
and whether it lacks routing rows that its engine captures."""


class GatewayMetrics:
    """Counters of one gateway; `exposition` is the text of `/metrics`. feed_consumer: shown before it leases too."""

    def __init__(self, *, feed_consumer: str) -> None:
        self._feed_consumer = feed_consumer
        self._num_like: Tally[_TurnLabels] = Tally()
        self._num_hidden = self._num_prompt_tokens = self._num_cached_tokens = self._num_output_tokens = 0
        self._registry = registry = CollectorRegistry()
        self._turns = Counter(
            "verbatim_turns", "Recorded turns by finish reason.", ["finish_reason"], registry=registry
        )
        self._matches = Counter("verbatim_matches", "Turns by how they were found.", ["tier"], registry=registry)
        self._segments = Counter("verbatim_segments", "Turns that opened one.", ["reason"], registry=registry)
        self._prompts = Counter(
            "verbatim_prompts", "Prompts by how equality with the template was established.", ["certified_by"],
            registry=registry,
        )  # fmt: skip
        self._hidden = Counter(
            "verbatim_hidden_messages", "Messages that the chat template does not show to the model.", registry=registry
        )
        self._audits = Gauge(
            "verbatim_certificate_audits", "Certified turns that were rendered too.", registry=registry
        )
        self._alarms = Gauge("verbatim_certificate_alarms", "Audits that came out different.", registry=registry)
        self._prompt_tokens = Counter("verbatim_prompt_tokens", "Prompt tokens sent.", registry=registry)
        self._cached_tokens = Counter("verbatim_cached_tokens", "Prompt tokens from the cache.", registry=registry)
        self._output_tokens = Counter("verbatim_output_tokens", "Tokens sampled.", registry=registry)
        self._untrainable = Counter("verbatim_untrainable_turns", "Not to be trained.", ["reason"], registry=registry)
        self._without_experts = Counter(
            "verbatim_turns_without_experts", "Turns whose routing rows were asked for and are not all there.",
            registry=registry,
        )  # fmt: skip
        self._interruptions = Counter(
            "verbatim_interruptions", "Engine requests that did not finish their turn.", ["engine", "cause"],
            registry=registry,
        )  # fmt: skip
        self._forwarded = Counter(
            "verbatim_forwarded_calls", "Calls of agents that an engine answered itself.", ["engine", "status"],
            registry=registry,
        )  # fmt: skip
        self._refused = Counter(
            "verbatim_refused_calls", "Calls refused for a key, the gateway's name or a limit.", ["reason"],
            registry=registry,
        )  # fmt: skip
        self._audit = Counter("verbatim_audit_lines", "Lines of the audit by what became of them.", ["state"],
            registry=registry,
        )  # fmt: skip
        self._refused_paths = Counter("verbatim_refused_paths", "Calls that no engine may answer.", registry=registry)
        self._prompt_seconds = _Seconds("verbatim_prompt_seconds", "Until the prompt stands.", registry)
        self._first_token_seconds = _Seconds("verbatim_first_token_seconds", "Until the first tokens.", registry)
        self._turn_seconds = _Seconds("verbatim_turn_seconds", "Until the record is on disk.", registry)
        self._running = Gauge("verbatim_turns_running", "Turns under way.", registry=registry)
        self._sessions = Gauge("verbatim_sessions_in_memory", "Sessions in memory.", registry=registry)
        self._engines = Gauge("verbatim_engines", "Engines by state.", ["state"], registry=registry)
        self._unleased = _of_consumer("verbatim_feed_unleased", "Rollouts that a consumer has yet to lease.", registry)
        self._leased = _of_consumer("verbatim_feed_leased", "Rollouts that a consumer holds.", registry)
        self._acknowledged = _of_consumer("verbatim_feed_acknowledged", "Rollouts it is done with.", registry)
        self._oldest = _of_consumer("verbatim_feed_oldest_seconds", "Age of the oldest one yet to lease.", registry)

        self._free_bytes = Gauge("verbatim_storage_free_bytes", "Free on the data folder's disk.", registry=registry)
        self._reserve_bytes = Gauge("verbatim_storage_reserve_bytes", "Held back for a full disk.", registry=registry)
        self._storage = Gauge(
            "verbatim_storage_state", "1 for the state that the disk is in.", ["state"], registry=registry
        )

    def observe_turn(self, finished: TurnFinished, generated: Generated, times: TurnTimes) -> None:
        """Count one recorded turn. Labelled counters take longer than all else here, so they learn of it when read."""
        record = finished.record
        lacks_rows = False
        if not generated.experts_complete:
            for engine in generated.engines:
                lacks_rows |= engine.captures_experts
        attachment = record.attachment
        self._num_like[
            record.finish.reason,
            attachment.tier,
            attachment.segment_reason,
            record.untrainable_reason,
            record.meta["certified_by"],
            lacks_rows,
        ] += 1
        self._num_hidden += len(record.meta["hidden_messages"])
        self._num_prompt_tokens += len(finished.whole.prompt_token_ids)
        self._num_cached_tokens += record.cached_tokens
        self._num_output_tokens += len(record.output_token_ids)
        self._prompt_seconds.observe(times.prompt_seconds)
        self._turn_seconds.observe(times.total_seconds)
        if times.first_token_seconds is not None:
            self._first_token_seconds.observe(times.first_token_seconds)

    def _count_turns(self) -> None:
        """Bring the counters up to date."""
        for (reason, tier, segment, untrainable, certified_by, lacks_rows), number in self._num_like.items():
            self._turns.labels(reason.value).inc(number)
            self._matches.labels(tier.value).inc(number)
            self._prompts.labels(certified_by).inc(number)
            if segment is not None:
                self._segments.labels(segment.value).inc(number)
            if untrainable is not None:
                self._untrainable.labels(untrainable).inc(number)
            if lacks_rows:
                self._without_experts.inc(number)
        self._hidden.inc(self._num_hidden)
        self._prompt_tokens.inc(self._num_prompt_tokens)
        self._cached_tokens.inc(self._num_cached_tokens)
        self._output_tokens.inc(self._num_output_tokens)
        self._num_like.clear()
        self._num_hidden = self._num_prompt_tokens = self._num_cached_tokens = self._num_output_tokens = 0

    def observe_interruption(self, interruption: Interruption) -> None:
        """Count one attempt that did not finish its turn."""
        self._interruptions.labels(interruption.engine_id, interruption.cause).inc()

    def observe_forward(self, engine_id: str, status: int) -> None:
        """Count one call that went to an engine as it was."""
        self._forwarded.labels(engine_id, str(status)).inc()

    def observe_refusal(self, reason: str) -> None:
        """Count one call that was refused: `no_key`, `wrong_key`, `host`, or the name of a limit."""
        self._refused.labels(reason).inc()

    def observe_audit(self, state: str) -> None:
        """Count one line of the audit: `written`, `failed` or `suppressed`."""
        self._audit.labels(state).inc()

    def observe_refused_path(self) -> None:
        """Count one that did not."""
        self._refused_paths.inc()

    def counts(self, audits: AuditCounts) -> JsonValue:
        """What this process has counted, for another worker to add: `{family: [[name, labels, value], …]}`."""
        self._count_turns()
        self._audits.set(audits.num_audits)
        self._alarms.set(audits.num_alarms)
        return {
            family.name: [[sample.name, sample.labels, sample.value] for sample in family.samples]
            for family in self._registry.collect()
            if _is_summed(family)
        }

    async def exposition(
        self,
        ledger: Ledger,
        pool: ReplicaPool,
        audits: AuditCounts,
        space: Space | None,
        *,
        num_running: int,
        num_sessions: int,
        others: Sequence[Mapping[str, JsonValue]] = (),
    ) -> bytes:
        """All figures as of now, with those that `others` have counted (`counts`) added."""
        self._count_turns()
        if space is not None:
            self._free_bytes.set(space.free_bytes)
            self._reserve_bytes.set(space.reserve_bytes)
            for state in SpaceState:
                self._storage.labels(state.value).set(state is space.state)
        self._audits.set(audits.num_audits)
        self._alarms.set(audits.num_alarms)
        self._running.set(num_running)
        self._sessions.set(num_sessions)
        healthy = sum(replica.healthy for replica in pool.replicas)
        self._engines.labels("healthy").set(healthy)
        self._engines.labels("ejected").set(len(pool.replicas) - healthy)
        await self._look_at_feed(ledger)
        return generate_latest(_Sum(self._registry, others))

    async def _look_at_feed(self, ledger: Ledger) -> None:
        """Back-pressure of every consumer, and of the one that the settings name, from before its first lease."""
        names = sorted({self._feed_consumer, *await ledger.consumers(limit=_MOST_CONSUMERS)})
        now = time.time()
        counts = await asyncio.gather(*(ledger.counts(name, now) for name in names))
        for gauge in (self._unleased, self._leased, self._acknowledged, self._oldest):
            gauge.clear()
        for name, figures in zip(names, counts, strict=True):
            self._unleased.labels(name).set(figures.unleased)
            self._leased.labels(name).set(figures.leased)
            self._acknowledged.labels(name).set(figures.acknowledged)
            self._oldest.labels(name).set(figures.oldest_seconds)


class _Sum:
    """Figures of several workers as those of one gateway. What is not summed says the same in each of them."""

    def __init__(self, registry: CollectorRegistry, others: Sequence[Mapping[str, JsonValue]]) -> None:
        self._registry = registry
        self._others = others

    def collect(self) -> Iterator[Metric]:
        """As the library asks for it."""
        for family in self._registry.collect():
            if self._others and _is_summed(family):
                self._add(family)
            yield family

    def _add(self, family: Metric) -> None:
        samples = {_identity(sample.name, sample.labels): sample for sample in family.samples}
        for counts in self._others:
            for name, labels, value in counts.get(family.name, ()):
                key = _identity(name, labels)
                mine = samples.get(key)
                if mine is None:
                    samples[key] = Sample(name, labels, value)
                elif name.endswith("_created"):  # of the oldest process
                    samples[key] = mine._replace(value=min(mine.value, value))
                else:
                    samples[key] = mine._replace(value=mine.value + value)
        family.samples = list(samples.values())


def _is_summed(family: Metric) -> bool:
    return family.type in _SUMMED_TYPES or family.name in _SUMMED_GAUGES


def _identity(name: str, labels: Mapping[str, str]) -> tuple[str, tuple[tuple[str, str], ...]]:
    return name, tuple(sorted(labels.items()))


def _of_consumer(name: str, text: str, registry: CollectorRegistry) -> Gauge:
    return Gauge(name, text, ["consumer"], registry=registry)


class _Seconds(Collector):
    """A histogram of durations; one more costs what finding its bucket does."""

    def __init__(self, name: str, text: str, registry: CollectorRegistry) -> None:
        self._name, self._text = name, text
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, seconds: float) -> None:
        """One more."""
        self._counts[bisect_left(_SECONDS, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterator[Metric]:
        """As the library asks for it."""
        bounds = [*(str(float(bound)) for bound in _SECONDS), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)
