import pytest


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    """A folder with data, in which the configs' relative paths are right."""
    from tests.test_examples import example  # which skips without transformers

    folder = tmp_path_factory.mktemp("train")
    example("tiny_data").main(folder / "tiny-data", 16)
    return folder


@pytest.fixture
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder
