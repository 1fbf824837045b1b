# SPDX-License-Identifier: Apache-2.0
# A shell workload: pipes, children, here documents, files, traps. Prints the
# same lines on every run.
set -eu
trap 'echo trapped' USR1
dir=$(mktemp -d)
i=0
while [ $i -lt 20 ]; do
	printf '%s\n' "$i" >"$dir/$i"
	i=$((i + 1))
done
cat "$dir"/* | sort -n | tail -n 1
(cd "$dir" && ls | wc -l)
mv "$dir/1" "$dir/renamed"
ln -s renamed "$dir/link"
cat "$dir/link"
cat <<END | tr a-z A-Z
here document
END
# It outlasts the way to wait, on a slow machine too: only then does dash suspend
# itself, by a call that it makes nowhere else.
sleep 1 &
wait $!
kill -USR1 $$
rm -r "$dir"
[ ! -e "$dir" ] && echo gone
