"""What a method's field may hold, and its meaning: read where a configuration is checked, and by nobody else.

pydantic, which checks configurations, asks annotations for their part of a schema; so methods and what trains them
need it neither installed nor imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic.json_schema import JsonSchemaValue
    from pydantic_core import CoreSchema

_MEANING = "description"


@dataclass(frozen=True)
class Field:
    """pydantic's Field for `Annotated`, by the same names: bounds of a number, length of a list, the key's meaning.

    strict: a number's own type alone, so that no text and no fraction is taken for it.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    min_length: int | None = None
    strict: bool | None = None
    allow_inf_nan: bool | None = None
    description: str = ""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic import Field as Bounded

        bounds = {name: value for name, value in vars(self).items() if name != _MEANING and value is not None}
        if not bounds:
            return handler(source)
        limit: Any = Bounded(**bounds)
        return handler(Annotated[source, limit])

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        found = handler(schema)
        return {**found, _MEANING: self.description} if self.description else found
