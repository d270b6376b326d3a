"""A loaded model → its fastest form on the device that it is on."""

from minibert.inference.prepare import PreparedBert as PreparedBert
from minibert.inference.prepare import prepare_for_inference as prepare_for_inference

__all__ = ["PreparedBert", "prepare_for_inference"]
