"""``/openapi.json``, and the same to be read by people at ``/docs``."""

from collections.abc import Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from api.api_keys import Access, ApiKeys
from api.documentation_page import documentation_page
from api.endpoints import Answer, Endpoint
from api.openapi import OpenApiDocument, openapi_document

# The page is one file: it asks nobody for anything, and runs nothing.
_CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


class DocumentationRoutes:
    """Describes the ``described`` endpoints, and itself. Both answers are made once."""

    def __init__(self, described: Sequence[Endpoint], keys: ApiKeys, release: str) -> None:
        document = openapi_document((*described, *self.endpoints), keys, release)
        self._document = msgspec.json.encode(document)
        self._page = documentation_page(document)

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        return (
            Endpoint(
                "GET",
                "/openapi.json",
                self.document,
                Access.OPEN,
                "documentation",
                "This document",
                (Answer("OpenAPI 3.1.", body=OpenApiDocument),),
            ),
            Endpoint(
                "GET",
                "/docs",
                self.page,
                Access.OPEN,
                "documentation",
                "This document, as a page",
                (Answer("A page without any other files.", text="text/html"),),
            ),
        )

    async def document(self, request: Request) -> Response:
        """``GET /openapi.json``."""
        return Response(self._document, media_type="application/json")

    async def page(self, request: Request) -> Response:
        """``GET /docs``."""
        headers = {"content-security-policy": _CONTENT_SECURITY_POLICY}
        return Response(self._page, headers=headers, media_type="text/html")
