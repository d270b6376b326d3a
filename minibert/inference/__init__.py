"""A loaded model → its fastest form on the device that it is on."""

from minibert.inference.prepare import prepare_for_inference as prepare_for_inference
from minibert.inference.prepared import PreparedBert as PreparedBert

__all__ = ["PreparedBert", "prepare_for_inference"]
