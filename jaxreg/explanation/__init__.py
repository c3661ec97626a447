"""What an optimizer does to each leaf of the weights, measured."""

from jaxreg.explanation.explaining import explain as explain
from jaxreg.explanation.records import Explanation as Explanation
from jaxreg.explanation.records import LeafExplanation as LeafExplanation

__all__ = ["Explanation", "LeafExplanation", "explain"]
