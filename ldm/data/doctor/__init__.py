"""The doctor of data: what a set holds, what is wrong with it, and what mends that, before anything is trained."""

from ldm.data.doctor.check import check_data
from ldm.data.doctor.diagnosis import Diagnosis, Finding

__all__ = ["Diagnosis", "Finding", "check_data"]
