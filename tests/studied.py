"""What the tests of study share: a tokenizer with few words, twins of a model for it, and the page in a browser."""

import base64
import os
import shutil
import tempfile
import zlib
from contextlib import contextmanager

import torch
from twins import twins

from minibert.tokenizer import from_vocabulary

WORDS = (
    "paris is the capital of france . , she drank a cup before breakfast un ##believ ##ab ##ly cold tea water".split()
)
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *(f"word{number}" for number in range(50))]
SIZES = dict(
    vocab_size=len(VOCABULARY),
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=37,
    max_position_embeddings=40,
    type_vocab_size=2,
)
TEXT, PAIR = "Paris is unbelievably cold, the capital of [MASK].", "She drank a cup of [MASK] before breakfast."


def tokenizer():
    return from_vocabulary(VOCABULARY)


def pair_of_models(**sizes):
    """(ours, transformers') with random weights, and large enough ones that every number is far from its neighbours."""
    return twins({**SIZES, **sizes})


def inputs(reading):
    """A reading as both models take it."""
    return dict(input_ids=torch.tensor([reading.ids]), token_type_ids=torch.tensor([reading.segments]))


def unpack(text):
    """The weights that `heads.pack` was given, (n,), to 0.004."""
    return torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(text))), dtype=torch.uint8).div(255).square()


@contextmanager
def browser(width=1440, height=900, dark=False):
    """Chromium without a screen and without a network, in an empty profile."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = shutil.which("chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for argument in (
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", f"--window-size={width},{height}"),
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = Chrome(options, Service(shutil.which("chromedriver"), env={**os.environ, "SE_OFFLINE": "true"}))
        try:
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
            yield driver
        finally:
            driver.quit()
