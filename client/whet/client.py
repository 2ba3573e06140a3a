"""The blocking client."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from whet import _embedding, _evaluation, _files, _generation, _merging, _models, _quantization, _training
from whet._channel import DEFAULT_ADDRESS, DEFAULT_MAX_MESSAGE_BYTES, DEFAULT_TIMEOUT_SECONDS, TLS, resolve_tls
from whet._embedding import EmbedInputs
from whet._examples import ExampleSource
from whet._models import AdapterSources
from whet._retry import DEFAULT_RETRY, NO_RETRY, RetryPolicy
from whet._streams import Generation, MergeJob, QuantizeJob, TrainingRun
from whet._sync import UNBOUNDED, Caller, Stream
from whet._values import new_request_id
from whet.options import AdaptOptions, GenerateOptions, QuantizeOptions, TrainOptions
from whet.types import (
    Adaptation,
    AdapterChoice,
    AdapterInfo,
    Embeddings,
    ModelInfo,
    PerplexityProgress,
    PerplexityResult,
    Prompt,
    Reply,
    RunInfo,
)
from whet.v1 import (
    embedding_pb2_grpc,
    evaluation_pb2_grpc,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    quantization_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)


class Client:
    """A connection to a Whet server. Safe to share among threads; close it, or use it in a ``with`` block.

    Every call raises ``whet.WhetError`` or one of its kinds; ``timeout`` of a call is in seconds and covers its
    retries (``float("inf")`` never ends).

    Args:
        address: ``host:port``.
        token: sent as ``authorization: Bearer``, if given.
        tls: True for TLS with the system's authorities, or a ``whet.TLS``. Without it, the connection is plain.
        timeout: seconds for calls that name no other. Training runs and quantizations take as long as they take.
        retry: how calls that are safe to repeat are repeated; None never repeats.
        max_message_bytes: of one message, either way.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        token: str | None = None,
        tls: TLS | bool | None = None,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        retry: RetryPolicy | None = DEFAULT_RETRY,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        self._caller = Caller(
            address,
            token=token,
            tls=resolve_tls(tls),
            timeout=timeout,
            retry=retry or NO_RETRY,
            max_bytes=max_message_bytes,
        )
        channel = self._caller.channel
        self._generation = generation_pb2_grpc.GenerationServiceStub(channel)
        self._training = training_pb2_grpc.TrainingServiceStub(channel)
        self._quantization = quantization_pb2_grpc.QuantizationServiceStub(channel)
        self._evaluation = evaluation_pb2_grpc.EvaluationServiceStub(channel)
        self._embedding = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        self._model = model_pb2_grpc.ModelServiceStub(channel)

    def close(self) -> None:
        """Closes the connection; calls in progress are cancelled."""
        self._caller.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------------- generation

    def generate(self, prompt: Prompt, *, model: str, **options: Unpack[GenerateOptions]) -> Generation:
        """Continues text, token ids or chat messages; iterate the result for its chunks as they come.

        Closing the result cancels the work.
        """
        request = _generation.generate_request(prompt, model, options)
        attempts = self._caller.attempts(options.get("timeout"))
        reader = _generation.GenerationReader(request)
        return Generation(self._caller, self._generation.Generate, request, reader, attempts)

    def complete(self, prompt: Prompt, *, model: str, **options: Unpack[GenerateOptions]) -> Reply:
        """``generate``, collected."""
        with self.generate(prompt, model=model, **options) as stream:
            return stream.result()

    def compare(
        self, prompt: Prompt, *, model: str, adapters: Sequence[AdapterChoice], **options: Unpack[GenerateOptions]
    ) -> list[Reply]:
        """``complete`` with each of several adapters, side by side: the requests run together, share each batch's base
        products, and cached prefixes where equal weights act.

        Args:
            adapters: None for the base, a name, or a name and version.
            options: of each; the request ids are ``request_id`` with the number of the adapter behind it, if given.
        Returns: a reply per adapter, in their order.
        """
        with contextlib.ExitStack() as stack:
            streams = [
                stack.enter_context(self.generate(prompt, model=model, **each))
                for each in _generation.each_adapter(adapters, options)
            ]
            return [stream.result() for stream in streams]

    def tokenize(
        self, prompt: Prompt, *, model: str, add_special_tokens: bool | None = None, timeout: float | None = None
    ) -> list[int]:
        """The token ids that ``generate`` would see for a text or chat messages."""
        request = _generation.tokenize_request(prompt, model, add_special_tokens)
        response = self._caller.unary(self._generation.Tokenize, request, request.request_id, timeout=timeout)
        return list(response.token_ids)

    def detokenize(
        self, token_ids: Sequence[int], *, model: str, skip_special_tokens: bool = True, timeout: float | None = None
    ) -> str:
        """The text of token ids."""
        request = _generation.detokenize_request(token_ids, model, skip_special_tokens)
        return self._caller.unary(self._generation.Detokenize, request, request.request_id, timeout=timeout).text

    # ------------------------------------------------------------------------------------------------------ training

    def train(
        self,
        examples: ExampleSource,
        *,
        model: str,
        adapter: str,
        eval_examples: ExampleSource | None = None,
        **options: Unpack[TrainOptions],
    ) -> TrainingRun:
        """Trains an adapter; iterate the result for the run's events.

        Args:
            examples: records (see ``whet.Example``), or the path of a .json or .jsonl file of them.
            adapter: name under which versions are published.
            eval_examples: held out, never trained on.
        """
        requests = _training.train_requests(examples, eval_examples, model, adapter, options)
        attempts = self._caller.attempts(options.get("timeout"), default=UNBOUNDED)
        reader = _training.RunReader("Train", requests[0].config.request_id)
        return TrainingRun(
            self._caller, self._training.Train, lambda: iter(requests), reader, attempts, self.cancel_run
        )

    def watch(self, run_id: str, *, from_step: int = 0, timeout: float | None = None) -> TrainingRun:
        """Attaches to a run: its events, those of the past first, without those of steps before ``from_step``."""
        request = training_pb2.WatchRunRequest(request_id=new_request_id(None), run_id=run_id, from_step=from_step)
        attempts = self._caller.attempts(timeout, default=UNBOUNDED)
        reader = _training.RunReader("WatchRun", request.request_id, run_id, ends_at_interruption=True)
        return TrainingRun(self._caller, self._training.WatchRun, request, reader, attempts, self.cancel_run)

    def resume(self, run_id: str, *, on_disconnect: str | None = None, timeout: float | None = None) -> TrainingRun:
        """Goes on with a run that was interrupted or cancelled, from its last checkpoint."""
        request = training_pb2.ResumeRunRequest(
            request_id=new_request_id(None), run_id=run_id, on_disconnect=_training.on_disconnect(on_disconnect)
        )
        attempts = self._caller.attempts(timeout, repeat=False, default=UNBOUNDED)
        reader = _training.RunReader("ResumeRun", request.request_id, run_id)
        return TrainingRun(self._caller, self._training.ResumeRun, request, reader, attempts, self.cancel_run)

    def run(self, run_id: str, *, timeout: float | None = None) -> RunInfo:
        """The archive's record of a run."""
        request = training_pb2.GetRunRequest(request_id=new_request_id(None), run_id=run_id)
        response = self._caller.unary(self._training.GetRun, request, request.request_id, timeout=timeout)
        return _training.from_run(response.run)

    def runs(
        self,
        *,
        model: str | None = None,
        adapter: str | None = None,
        state: str | None = None,
        timeout: float | None = None,
    ) -> list[RunInfo]:
        """All runs, newest first; of a model, for an adapter, or in a state alone, where given."""
        runs: list[RunInfo] = []
        page_token = ""
        while True:
            request = training_pb2.ListRunsRequest(
                request_id=new_request_id(None),
                page_size=_models.PAGE_SIZE,
                page_token=page_token,
                model=model or "",
                adapter=adapter or "",
                state=_training.run_state(state),
            )
            response = self._caller.unary(self._training.ListRuns, request, request.request_id, timeout=timeout)
            runs += [_training.from_run(run) for run in response.runs]
            page_token = response.next_page_token
            if not page_token:
                return runs

    def cancel_run(self, run_id: str, *, timeout: float | None = None) -> RunInfo:
        """Ends a run after its present slice; does nothing to one that has ended."""
        request = training_pb2.CancelRunRequest(request_id=new_request_id(None), run_id=run_id)
        response = self._caller.unary(self._training.CancelRun, request, request.request_id, timeout=timeout)
        return _training.from_run(response.run)

    def adapt(
        self, examples: ExampleSource, *, model: str, adapter: str, **options: Unpack[AdaptOptions]
    ) -> Adaptation:
        """Online adaptation: a few optimizer steps on a few examples; the new version is live on return."""
        request = _training.adapt_request(examples, model, adapter, options)
        response = self._caller.unary(self._training.Adapt, request, request.request_id, timeout=options.get("timeout"))
        return _training.from_adaptation(response)

    # ------------------------------------------------------------------------- quantization, evaluation, embeddings

    def quantize(self, *, model: str, scheme: str, output: str, **options: Unpack[QuantizeOptions]) -> QuantizeJob:
        """Writes a quantized copy of a model; iterate the result for progress, then read its ``report``.

        Args:
            scheme: "q8" or "q4".
            output: name of the new model.
        """
        request = _quantization.quantize_request(model, scheme, output, options)
        attempts = self._caller.attempts(options.get("timeout"), default=UNBOUNDED)
        reader = _quantization.QuantizeReader(request)
        return QuantizeJob(self._caller, self._quantization.Quantize, request, reader, attempts)

    def perplexity(
        self,
        text: str | Sequence[int],
        *,
        model: str,
        adapter: str | None = None,
        adapter_version: int | None = None,
        window: int | None = None,
        stride: int | None = None,
        max_tokens: int | None = None,
        on_progress: Callable[[PerplexityProgress], None] | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> PerplexityResult:
        """Perplexity of a text or of token ids; each token but the first is scored once.

        Args:
            window: tokens of one forward.
            stride: tokens by which the window moves.
            max_tokens: score the first so many tokens alone.
            on_progress: called as windows are done.
        """
        request = _evaluation.perplexity_request(
            text,
            model=model,
            adapter=adapter,
            adapter_version=adapter_version,
            window=window,
            stride=stride,
            max_tokens=max_tokens,
            request_id=request_id,
        )
        reader = _evaluation.PerplexityReader(request)
        attempts = self._caller.attempts(timeout)
        with Stream(self._caller, self._evaluation.Perplexity, request, reader, attempts) as stream:
            for progress in stream:
                if on_progress is not None:
                    on_progress(progress)
        assert reader.result is not None  # else its end() raised
        return reader.result

    def embed(
        self,
        inputs: EmbedInputs,
        *,
        model: str,
        normalize: bool | None = None,
        dimensions: int | None = None,
        pooling: str | None = None,
        input_type: str | None = None,
        instruction: str | None = None,
        adapter: str | None = None,
        adapter_version: int | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> Embeddings:
        """Embeds texts or token ids, any number of them.

        Args:
            normalize: scale vectors to length 1. Default: True.
            dimensions: keep the first so many (Matryoshka).
            pooling: "mean", "cls" or "last"; default: the model's own.
            input_type: "query" or "document": put the model's own prefix for it before texts. Without one, or
                where the model has none for it, the model's default prefix, if any.
            instruction: what the vectors of these queries are for, in place of the task that the model's own query
                prefix states; for models that take instructions (Qwen3-Embedding).
        """
        requests = _embedding.embed_requests(
            inputs,
            model=model,
            normalize=normalize,
            dimensions=dimensions,
            pooling=pooling,
            input_type=input_type,
            instruction=instruction,
            adapter=adapter,
            adapter_version=adapter_version,
            request_id=request_id,
        )
        return _embedding.from_embeddings(
            [
                self._caller.unary(self._embedding.Embed, request, request.request_id, timeout=timeout)
                for request in requests
            ]
        )

    # ------------------------------------------------------------------------------------------- models and adapters

    def models(self, *, timeout: float | None = None) -> list[ModelInfo]:
        """All models that the server knows, by name."""
        models: list[ModelInfo] = []
        page_token = ""
        while True:
            request = model_pb2.ListModelsRequest(
                request_id=new_request_id(None), page_size=_models.PAGE_SIZE, page_token=page_token
            )
            response = self._caller.unary(self._model.ListModels, request, request.request_id, timeout=timeout)
            models += [_models.from_model(model) for model in response.models]
            page_token = response.next_page_token
            if not page_token:
                return models

    def model(self, name: str, *, timeout: float | None = None) -> ModelInfo:
        """One model."""
        request = model_pb2.GetModelRequest(request_id=new_request_id(None), name=name)
        response = self._caller.unary(self._model.GetModel, request, request.request_id, timeout=timeout)
        return _models.from_model(response.model)

    def load_model(self, name: str, *, timeout: float | None = None) -> ModelInfo:
        """Loads a model that the server knows; returns when it is ready."""
        request = model_pb2.LoadModelRequest(request_id=new_request_id(None), name=name)
        response = self._caller.unary(self._model.LoadModel, request, request.request_id, timeout=timeout)
        return _models.from_model(response.model)

    def unload_model(self, name: str, *, force: bool = False, timeout: float | None = None) -> ModelInfo:
        """Frees a model's memory. With ``force``, requests and jobs that use it are aborted."""
        request = model_pb2.UnloadModelRequest(request_id=new_request_id(None), name=name, force=force)
        response = self._caller.unary(self._model.UnloadModel, request, request.request_id, timeout=timeout)
        return _models.from_model(response.model)

    def adapters(
        self,
        *,
        model: str | None = None,
        name: str | None = None,
        live_only: bool = False,
        timeout: float | None = None,
    ) -> list[AdapterInfo]:
        """Every version of every adapter, or those asked for."""
        adapters: list[AdapterInfo] = []
        page_token = ""
        while True:
            request = _models.list_adapters_request(model, name, live_only, page_token)
            response = self._caller.unary(self._model.ListAdapters, request, request.request_id, timeout=timeout)
            adapters += [_models.from_adapter(adapter) for adapter in response.adapters]
            page_token = response.next_page_token
            if not page_token:
                return adapters

    def adapter(
        self, name: str, *, model: str, version: int | None = None, timeout: float | None = None
    ) -> AdapterInfo:
        """One version of an adapter; the live one unless named."""
        request = _models.get_adapter_request(name, model, version)
        response = self._caller.unary(self._model.GetAdapter, request, request.request_id, timeout=timeout)
        return _models.from_adapter(response.adapter)

    def adapter_lineage(
        self, name: str, *, model: str, version: int | None = None, timeout: float | None = None
    ) -> list[AdapterInfo]:
        """What a version (the live one unless named) came from, and itself: each after its parent and its sources.

        Versions that were deleted are missing; what came from them still names them.
        """
        return _models.ancestors(name, version, self.adapters(model=model, timeout=timeout))

    def load_adapter(
        self,
        name: str,
        *,
        model: str,
        version: int | None = None,
        force: bool = False,
        timeout: float | None = None,
    ) -> AdapterInfo:
        """Brings a stored version (the newest unless named) into memory and makes it live.

        Args:
            force: also one that was trained on other base weights, if the shapes fit.
        """
        request = _models.load_adapter_request(name, model, version, force)
        response = self._caller.unary(self._model.LoadAdapter, request, request.request_id, timeout=timeout)
        return _models.from_adapter(response.adapter)

    def unload_adapter(
        self, name: str, *, model: str, version: int | None = None, timeout: float | None = None
    ) -> list[AdapterInfo]:
        """Frees an adapter's memory; it stays stored. Returns the versions that were unloaded."""
        request = _models.unload_adapter_request(name, model, version)
        response = self._caller.unary(self._model.UnloadAdapter, request, request.request_id, timeout=timeout)
        return [_models.from_adapter(adapter) for adapter in response.adapters]

    def delete_adapter(
        self, name: str, *, model: str, version: int | None = None, timeout: float | None = None
    ) -> list[AdapterInfo]:
        """Removes an adapter, or one version, from memory and disk. Returns what was deleted."""
        request = _models.delete_adapter_request(name, model, version)
        response = self._caller.unary(
            self._model.DeleteAdapter, request, request.request_id, timeout=timeout, repeat=False
        )
        return [_models.from_adapter(adapter) for adapter in response.adapters]

    def revert_adapter(
        self, name: str, *, model: str, version: int | None = None, timeout: float | None = None
    ) -> AdapterInfo:
        """Makes an earlier version live again; the next ``adapt``, or ``train`` from it, goes on from there under a new
        number. No version is lost.

        Args:
            version: default: the one that the live version went on from.
        Raises:
            FailedPreconditionError: none is named, and the live version went on from none of this name.
        """
        if version is None:
            version = _models.version_before(self.adapter(name, model=model, timeout=timeout))
        return self.load_adapter(name, model=model, version=version, timeout=timeout)

    def rename_adapter(
        self, name: str, new_name: str, *, model: str, timeout: float | None = None
    ) -> list[AdapterInfo]:
        """Gives an adapter another name. Returns its versions, which keep their numbers."""
        request = _models.rename_adapter_request(name, new_name, model)
        response = self._caller.unary(
            self._model.RenameAdapter, request, request.request_id, timeout=timeout, repeat=False
        )
        return [_models.from_adapter(adapter) for adapter in response.adapters]

    def prune_adapters(
        self,
        name: str | None = None,
        *,
        model: str,
        keep_last: int,
        dry_run: bool = False,
        timeout: float | None = None,
    ) -> list[AdapterInfo]:
        """Deletes versions that are not live, not among the newest, and not needed by a request, a job or a run that
        may be resumed. Returns what was deleted.

        Args:
            name: default: every adapter of the model.
            keep_last: newest versions of each adapter to keep, 0 or more.
            dry_run: delete nothing; return what would be.
        """
        request = _models.prune_adapters_request(name, model, keep_last, dry_run)
        response = self._caller.unary(
            self._model.PruneAdapterVersions, request, request.request_id, timeout=timeout, repeat=False
        )
        return [_models.from_adapter(adapter) for adapter in response.adapters]

    def combine_adapters(
        self,
        name: str,
        sources: AdapterSources,
        *,
        model: str,
        method: str | None = None,
        force: bool = False,
        timeout: float | None = None,
    ) -> AdapterInfo:
        """Makes a new version of ``name`` from several adapters, live on return.

        Args:
            sources: names to weights, or ``WeightedAdapter``s where versions matter.
            method: "cat", the default: exactly the weighted sum of the updates; ranks add up. "linear": PEFT's
                weighted sums of the factors; ranks are equal, and stay.
            force: also adapters that were trained on other base weights.
        """
        request = _models.combine_adapters_request(name, sources, model, method, force)
        response = self._caller.unary(
            self._model.CombineAdapters, request, request.request_id, timeout=timeout, repeat=False
        )
        return _models.from_adapter(response.adapter)

    def merge_adapter(
        self,
        adapters: str | AdapterSources,
        *,
        model: str,
        output: str,
        dtype: str | None = None,
        force: bool = False,
        load: bool | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> MergeJob:
        """Writes a model of its own with adapters merged into its weights; iterate the result for progress, then read
        its ``report``.

        Args:
            adapters: a name; names to weights; or ``WeightedAdapter``s where versions matter.
            output: name of the new model.
            dtype: of matrices: "float32", "bfloat16" or "float16". Default: as in the source; of a GGUF file mostly
                bfloat16, of a quantized model the type of its scales.
            force: also adapters that were trained on other base weights.
            load: load the result once it is written. Default: True.
            timeout: seconds; default: without end.
        """
        request = _merging.merge_request(
            adapters, model=model, output=output, dtype=dtype, force=force, load=load, request_id=request_id
        )
        attempts = self._caller.attempts(timeout, default=UNBOUNDED)
        return MergeJob(self._caller, self._model.MergeAdapter, request, _merging.MergeReader(request), attempts)

    def import_adapter(
        self,
        name: str,
        *,
        model: str,
        directory: str | Path,
        force: bool = False,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> AdapterInfo:
        """Uploads a PEFT adapter (adapter_config.json, adapter_model.safetensors) as a new version, live on return.

        Args:
            force: also one that says that it was trained on other base weights, if the shapes fit.
        """
        request_id = new_request_id(request_id)
        messages = functools.partial(_files.import_requests, name, model, directory, request_id, force)
        response = self._caller.unary(self._model.ImportAdapter, messages, request_id, timeout=timeout)
        return _models.from_adapter(response.adapter)

    def export_adapter(
        self,
        name: str,
        *,
        model: str,
        directory: str | Path,
        version: int | None = None,
        overwrite: bool = False,
        timeout: float | None = None,
    ) -> AdapterInfo:
        """Downloads an adapter in PEFT's format; ``directory`` appears whole or not at all.

        Raises:
            FileExistsError: ``directory`` is not empty, and ``overwrite`` is not set.
        """
        request = _models.export_adapter_request(name, model, version)
        with _files.Download(directory, overwrite=overwrite, request_id=request.request_id) as download:
            attempts = self._caller.attempts(timeout)
            with Stream(self._caller, self._model.ExportAdapter, request, download, attempts) as stream:
                for _ in stream:
                    pass
            return _models.from_adapter(download.commit())
