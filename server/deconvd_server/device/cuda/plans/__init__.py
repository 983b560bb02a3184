"""Plans: which candidates there are for a request, which of them is taken, and where that is kept."""

from deconvd_server.device.cuda.plans.book import BookStats, PlanBook
from deconvd_server.device.cuda.plans.key import PlanKey
from deconvd_server.device.cuda.plans.store import PlanStore

__all__ = ["BookStats", "PlanBook", "PlanKey", "PlanStore"]
