# Sourced by the scripts beside it: the repository's root as the working directory, a scratch folder that
# goes when they end, and uv, of one version, which resolves for other Pythons and systems than this one.
script=$(realpath "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
export HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1

# Prints the comment at the top of a script, if its first argument asks for it, and ends.
print_help_if_asked() {
  case "${1:-}" in
    -h | --help)
      sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$script"
      exit 0
      ;;
  esac
}

install_uv() {
  python3 -m venv "$place/uv"
  "$place/uv/bin/pip" install --quiet uv==0.13.9
  PATH="$place/uv/bin:$PATH"
}

# Usage: test_and_record PYTHON RESULT COMMAND: run the tests, keep versions and counts in a result file.
test_and_record() {
  local status=0
  "$1" -m pytest --junit-xml "$place/tests.xml" || status=$?
  "$1" .ci/record.py --command "$3" --tests "$place/tests.xml" --result "$2"
  return "$status"
}
