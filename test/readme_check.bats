# scripts/readme_check.sh: what it runs of a document, and what it takes for a failure
load common

setup() {
    cd "$BATS_TEST_DIRNAME/.."
    OUT=$BATS_TEST_TMPDIR/out MARK=$BATS_TEST_TMPDIR/mark
    export OUT MARK
}

# document: README from stdin, checked
document() {
    cat > "$BATS_TEST_TMPDIR/doc.md"
    run scripts/readme_check.sh "$BATS_TEST_TMPDIR/doc.md"
}

@test "commands of sh blocks run in order, over several lines, and nothing else does" {
    document << 'END'
Text: `touch "$MARK.inline"`
```sh
echo one > "$MARK"    # a comment
# touch "$MARK.comment"

echo two \
    three >> "$MARK"
```
```
touch "$MARK.plain"
```
```text
touch "$MARK.text"
```
```sh gpu
touch "$MARK.gpu"
```
END
    [ "$status" = 0 ]
    [ "$(cat "$MARK")" = $'one\ntwo three' ]
    [ "$(ls "$MARK"*)" = "$MARK" ]
    [[ $output = *'needs gpu: touch "$MARK.gpu"'*'2 commands run, 0 failed, 1 not run' ]]
}

@test "a command that fails is named, and those after it still run" {
    document << 'END'
```sh
false || exit 3
ls /there/is/none | cat
echo on > "$MARK"
```
END
    [ "$status" = 1 ]
    [ "$(cat "$MARK")" = on ]
    [[ $output = *'FAILED, status 3'*'FAILED, status 2'*'3 commands run, 2 failed, 0 not run' ]]
}

@test "what console blocks show is what is printed, to the last line" {
    document << 'END'
```console
$ printf 'a\n\nb\n'
a

b
$ true
```
END
    [ "$status" = 0 ]
    document << 'END'
```console
$ printf 'a\nb\n'
a
```
END
    [ "$status" = 1 ]
    [[ $output = *'PRINTS OTHER LINES'* ]]
}

@test "SKIP leaves commands out and says so; a document without commands, and one that is not there, are no success" {
    export SKIP='^make '
    document << 'END'
```sh
make nothing-of-this-kind
true
```
END
    [ "$status" = 0 ]
    [[ $output = *'not run  make nothing-of-this-kind'* ]]
    document <<< 'no command'
    [ "$status" = 1 ]
    document << 'END'
```sh
true
END
    [ "$status" = 2 ]
    document << 'END'
```sh
true \
```
END
    [ "$status" = 2 ]
    [[ $output = *'goes on, and its block ends'* ]]
    run scripts/readme_check.sh "$BATS_TEST_TMPDIR/none.md"
    [ "$status" = 2 ]
    [[ $output = *none.md* ]]
}
