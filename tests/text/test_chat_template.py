from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from eagleray.core.errors import ConfigError, InvalidRequest
from eagleray.text.chat_template import ChatTemplate
from eagleray.text.fake import byte_tokenizer, chatml_template

USER = {"role": "user", "content": "Hi <b>"}
STRICT = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {% if message.role not in ['system', 'user', 'assistant'] %}\n"
    "        {{ raise_exception('Unknown role: ' + message.role) }}\n"
    "    {% endif %}\n"
    "    {% if loop.index > 3 %}{% break %}{% endif %}\n"
    "    {% generation %}{{ message | tojson }}{% endgeneration %}\n"
    "{% endfor %}\n"
)
PARTS_ONLY = "{% for message in messages %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endfor %}"


def test_rendering_equals_transformers():
    messages = [USER, {"role": "assistant", "content": "Hé"}, USER]
    for source in (STRICT, PARTS_ONLY.replace("part.text", "part")):
        theirs, _ = render_jinja_template([messages], chat_template=source, bos_token="<s>", add_generation_prompt=True)
        assert ChatTemplate(source, "<s>").render(messages) == theirs[0]


def test_text_parts_equal_a_string():
    parts = {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "<b>"}]}
    assert chatml_template().render([parts]) == chatml_template().render([USER])
    assert chatml_template().render([USER]).endswith("<|im_start|>assistant\n")


def test_a_template_that_reads_parts_gets_parts():
    assert ChatTemplate(PARTS_ONLY).render([USER]) == "Hi <b>"


def test_the_developer_role_is_the_system_role_where_the_template_does_not_know_it():
    assert '"role": "system"' in ChatTemplate(STRICT).render([{"role": "developer", "content": "x"}])


def test_a_role_that_the_template_refuses_is_the_users_mistake():
    with pytest.raises(InvalidRequest, match="Unknown role: martian") as caught:
        ChatTemplate(STRICT).render([{"role": "martian", "content": "x"}])
    assert caught.value.param == "messages"


def test_a_part_that_is_not_text_is_refused_by_its_place():
    with pytest.raises(InvalidRequest, match="image_url") as caught:
        chatml_template().render([USER, {"role": "user", "content": [{"type": "image_url"}]}])
    assert caught.value.param == "messages[1].content"


def test_a_model_without_a_template_says_where_to_go():
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        ChatTemplate(None).render([USER])


def test_the_last_message_can_be_continued():
    text = chatml_template().render(
        [USER, {"role": "assistant", "content": "Once upon "}], add_generation_prompt=False, continue_final_message=True
    )
    assert text.endswith("assistant\nOnce upon ")
    with pytest.raises(InvalidRequest, match="continue_final_message"):
        chatml_template().render([{"role": "user", "content": ""}], continue_final_message=True)


def test_a_template_cannot_reach_out_of_its_sandbox():
    with pytest.raises(InvalidRequest, match="unsafe"):
        ChatTemplate("{{ messages.__class__.__mro__ }}").render([USER])


def test_a_broken_template_is_refused_at_start():
    with pytest.raises(ConfigError, match="chat_template"):
        ChatTemplate("{% for %}")


@pytest.mark.parametrize("named", [False, True])
def test_the_template_comes_from_its_file_or_the_tokenizer_config(tmp_path: Path, named: bool):
    inner = [{"name": "default", "template": "config"}] if named else "config"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": inner}))
    assert ChatTemplate.from_folder(tmp_path, byte_tokenizer()).render([USER]) == "config"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate.from_folder(tmp_path, byte_tokenizer()).render([USER]) == "file"
