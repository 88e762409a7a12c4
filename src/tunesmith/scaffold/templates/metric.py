"""How many of an answer's tokens are those that the model finds likeliest: counted, not sampled."""

from tunesmith.errors import DataError
from tunesmith.plugin import Spec, hookimpl
from tunesmith.plugin.metrics import Measured, Metric, MetricConfig


class NewName(Metric[MetricConfig]):
    """`newname` in 0..1, the number of `tokens` it is over, and `rows_dropped`."""

    def measure(self, session, examples):
        """Return the share over all answer tokens, each given what stands before it."""
        from tunesmith.data.pack import PaddingCollator, padding_id
        from tunesmith.data.render import IGNORE_INDEX, Renderer

        renderer = Renderer(session.tokenizer, self.config.max_length)
        rendered = [renderer.sequences(example) for example in examples]
        rows = [row for every in rendered for row in every if row.trained]
        if not rows:
            raise DataError(f"newname: no answer token within max_length={self.config.max_length}")
        collate = PaddingCollator(padding_id(session.tokenizer))
        hits = tokens = 0
        for start in range(0, len(rows), self.config.batch_size):
            batch = collate(rows[start : start + self.config.batch_size])  # [rows, length] each
            batch = {name: tensor.to(session.device) for name, tensor in batch.items()}
            labels = batch.pop("labels")
            logits = session.model(**batch, use_cache=False).logits
            logits = logits[:, -labels.shape[1] :]  # a method may put tokens of its own before them
            guessed, wanted = logits[:, :-1].argmax(-1), labels[:, 1:]
            counts = wanted != IGNORE_INDEX  # padding and the prompt are not
            hits += int((guessed == wanted)[counts].sum())
            tokens += int(counts.sum())
        dropped = sum(not any(row.trained for row in every) for every in rendered)
        values = {"newname": hits / tokens, "tokens": float(tokens), "rows_dropped": float(dropped)}
        return Measured(values)


@hookimpl
def tunesmith_metrics():
    """Register the metric."""
    return [
        Spec(
            "newname",
            MetricConfig,
            f"{__name__}:NewName",
            example="conversation",
            summary="share of tokens that are the likeliest",
        )
    ]
