// SPDX-License-Identifier: Apache-2.0

// Package contrib holds only tests: what is offered for copying works.
//
// SYSLATCH_TOOLS names the directory with containerd; SYSLATCH_TEST_BIN one with
// syslatch and syslatchd, which are built where it is not set.
package contrib

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
)

// programs is a directory with syslatch and syslatchd.
func programs(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv("SYSLATCH_TEST_BIN"); dir != "" {
		return dir
	}
	dir := t.TempDir()
	if out, err := exec.Command("go", "build", "-o", dir+"/", "../cmd/...").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return dir
}

func tools(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("SYSLATCH_TOOLS")
	if dir == "" {
		t.Fatal("SYSLATCH_TOOLS names no directory with containerd (make deps builds it)")
	}
	return dir
}

func glob(t *testing.T, pattern string) []string {
	t.Helper()
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) == 0 {
		t.Fatalf("%s: %v, %v", pattern, files, err)
	}
	return files
}

func TestPoliciesAreGood(t *testing.T) {
	bin := programs(t)
	for _, file := range glob(t, "policy/*.yaml") {
		if out, err := exec.Command(bin+"/syslatchd", "--check-config", "--config", file).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", file, err, out)
		}
	}
}

// containerd takes the snippet as an import, and doctor is content with it.
func TestContainerdConfiguration(t *testing.T) {
	bin, tools := programs(t), tools(t)
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(t.TempDir(), "config.toml")
	text := fmt.Sprintf("version = 3\nimports = [%q]\n", filepath.Join(here, "containerd", "*.toml"))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	dump, err := exec.Command(tools+"/containerd", "--config", config, "config", "dump").Output()
	if err != nil {
		t.Fatalf("containerd config dump: %v", err)
	}
	var got struct {
		Plugins map[string]struct {
			Disable   bool `toml:"disable"`
			Validator struct {
				Enable   bool     `toml:"enable"`
				Required []string `toml:"required_plugins"`
			} `toml:"default_validator"`
		} `toml:"plugins"`
	}
	if err := toml.Unmarshal(dump, &got); err != nil {
		t.Fatal(err)
	}
	nri := got.Plugins["io.containerd.nri.v1.nri"]
	if nri.Disable || !nri.Validator.Enable || strings.Join(nri.Validator.Required, " ") != "syslatch" {
		t.Errorf("containerd understands %+v", nri)
	}

	cmd := exec.Command(bin+"/syslatch", "doctor", "-o", "json", "--containerd-config", config)
	cmd.Env = append(os.Environ(), "PATH="+tools+":"+os.Getenv("PATH"))
	out, _ := cmd.Output() // its status is about this host
	var report struct {
		Checks []struct{ Name, Status, Found, Remedy string }
	}
	if err := json.Unmarshal(out, &report); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, c := range report.Checks {
		if c.Name == "nri.validator" {
			if c.Status != "ok" {
				t.Errorf("doctor: %+v", c)
			}
			return
		}
	}
	t.Errorf("doctor doesn't look at nri.validator: %s", out)
}

// systemd knows every directive: verify warns of those that it doesn't, and
// ends with 0 all the same.
func TestUnitsAreKnownToSystemd(t *testing.T) {
	bin := programs(t)
	for _, file := range glob(t, "systemd/*.service") {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		// verify wants the program to be there.
		unit := strings.ReplaceAll(string(data), "=/usr/bin/syslatchd ", "="+bin+"/syslatchd ")
		path := filepath.Join(t.TempDir(), filepath.Base(file))
		if err := os.WriteFile(path, []byte(unit), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("systemd-analyze", "verify", "--man=no", path).CombinedOutput()
		if err != nil || len(out) > 0 {
			t.Errorf("%s: %v\n%s", file, err, out)
		}
	}
}
