"""Whether a chat template takes a message's content as a list of parts, read off its source."""

from collections.abc import Iterator

from jinja2 import nodes

_PART_FILTERS = frozenset({"map", "selectattr", "rejectattr", "select", "reject", "list"})


def reads_parts(tree: nodes.Template) -> bool:
    """Whether the template goes through the parts of a content, or takes one of them.

    A template that does not would print the list as Python writes it.
    """
    names = _names_of_contents(tree)
    loops = (loop.iter for loop in tree.find_all(nodes.For))
    filters = (
        node.node
        for node in tree.find_all(nodes.Filter)
        if node.name in _PART_FILTERS and node.node is not None
    )
    items = (
        item.node
        for item in tree.find_all(nodes.Getitem)
        if isinstance(item.arg, nodes.Const) and isinstance(item.arg.value, int)
    )
    return any(_is_content(node, names) for found in (loops, filters, items) for node in found)


def _names_of_contents(tree: nodes.Template) -> set[str]:
    """The variables and macros' parameters that a content is handed on by."""
    bindings = list(_bindings(tree))
    names: set[str] = set()
    while True:
        found = {name for name, value in bindings if _is_content(value, names)}
        if found <= names:
            return names
        names |= found


def _bindings(tree: nodes.Template) -> Iterator[tuple[str, nodes.Node]]:
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name):
            yield assignment.target.name, assignment.node
    parameters = {macro.name: macro.args for macro in tree.find_all(nodes.Macro)}
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name in parameters:
            given = zip(parameters[call.node.name], call.args, strict=False)
            yield from ((parameter.name, value) for parameter, value in given)
            yield from ((keyword.key, keyword.value) for keyword in call.kwargs)


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    """Whether ``node`` may be a message's content as it came, or a selection of its parts."""
    match node:
        case nodes.Name():
            return node.name in names
        case nodes.Getattr():
            return node.attr == "content"
        case nodes.Getitem():
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        case nodes.Filter() if node.node is not None:
            return node.name in _PART_FILTERS and _is_content(node.node, names)
        case nodes.CondExpr():
            branches = (node.expr1, node.expr2)
            return any(_is_content(branch, names) for branch in branches if branch is not None)
        case nodes.Or() | nodes.And():
            return _is_content(node.left, names) or _is_content(node.right, names)
    return False
