"""(IA)^3 has its vectors where its formula says; what holds of all adapters is in test_adapters.py."""

from lmjax.registry import without_data
from lmjax.weights import abstract, by_path
from tests.finetune.test_parts import config


def test_what_a_matrix_gives_is_rescaled_and_of_those_that_write_to_the_stream_what_they_read() -> None:
    task = without_data(config("llama3", tune={"adapter": {"name": "ia3", "targets": ("segments/*", "unembed")}}))
    shapes = {path.removeprefix("adapter/segments/0/0/"): x.shape for path, x in by_path(abstract(task.spec)).items()}
    assert shapes["attention/query/by"] == (3, 4, 6) and shapes["attention/output/by"] == (3, 4, 6)
    assert shapes["mlp/up/by"] == shapes["mlp/down/by"] == (3, 40) and shapes["adapter/unembed/by"] == (61,)
