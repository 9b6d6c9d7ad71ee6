"""Reference systems over the modules."""

from rom.models.cache import RoutingMambaCache
from rom.models.config import RoutingMambaConfig
from rom.models.language_model import RoutingMambaLM, RoutingMambaOutput
from rom.models.text_guided import TextGuidedClassifier

__all__ = ["RoutingMambaCache", "RoutingMambaConfig", "RoutingMambaLM", "RoutingMambaOutput", "TextGuidedClassifier"]
