"""Extraction: a text in, an object of a given class out, whatever the model.

Start a server with ``make serve``, then run this with the ``openai`` package installed. The answer
is bound to the class' JSON schema while it is generated, so that it always parses.
"""

from __future__ import annotations

import argparse
from typing import Literal

import openai
from pydantic import BaseModel, Field

TEXT = "Mail from Ada: the parcel with 3 lamps arrived broken this morning, please send new ones!"


class Ticket(BaseModel):
    """What a support desk needs of a message."""

    sender: str = Field(max_length=40)
    product: str = Field(max_length=40)
    quantity: int = Field(ge=0, le=1000)
    kind: Literal["question", "complaint", "praise"]
    is_urgent: bool


def extract(client: openai.OpenAI, model: str, text: str) -> Ticket:
    """The ticket that a text stands for."""
    answer = client.chat.completions.parse(
        model=model,
        messages=[
            {"role": "system", "content": "Fill in a ticket from the user's message, as JSON."},
            {"role": "user", "content": text},
        ],
        response_format=Ticket,
        temperature=0,
        max_tokens=200,
    )
    ticket = answer.choices[0].message.parsed
    assert ticket is not None
    return ticket


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="?", default=TEXT)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    arguments = parser.parse_args()
    client = openai.OpenAI(base_url=arguments.url + "/v1", api_key="none")
    model = client.models.list().data[0].id
    print(extract(client, model, arguments.text).model_dump_json(indent=2))


if __name__ == "__main__":
    main()
