package cluster

import (
	"archive/tar"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

func TestImageTagDependsOnContentOnly(t *testing.T) {
	dir := t.TempDir()
	program, rootfs := filepath.Join(dir, "program"), filepath.Join(dir, "rootfs")
	write := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(program, "one")
	write(filepath.Join(rootfs, "usr/sbin/tool"), "tool")
	if err := os.Symlink("usr/sbin", filepath.Join(rootfs, "sbin")); err != nil {
		t.Fatal(err)
	}
	pack := func() Image {
		t.Helper()
		image, err := imageSpec{name: "local/x", program: program, target: "/x", rootfs: rootfs}.pack(dir)
		if err != nil {
			t.Fatal(err)
		}
		return image
	}
	first := pack()
	if err := os.Chtimes(program, time.Time{}, time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if again := pack(); again != first {
		t.Errorf("the same content resulted in %v, then in %v", first, again)
	}
	write(program, "two")
	second := pack()
	if second.Tag == first.Tag {
		t.Error("different content has the same tag")
	}
	manifest, err := tarball.LoadManifest(func() (io.ReadCloser, error) { return os.Open(second.Archive) })
	if err != nil || len(manifest) != 1 || !slices.Equal(manifest[0].RepoTags, []string{second.Ref()}) {
		t.Errorf("the archive's manifest is %+v (error %v), want one entry whose only tag is that of the image", manifest, err)
	}
	names := layerNames(t, second.Archive)
	for _, want := range []string{"x", "sbin", "usr/sbin/tool"} {
		if !strings.Contains(names, "\n"+want+"\n") {
			t.Errorf("%s is not in the image; the image contains:%s", want, names)
		}
	}
}

func layerNames(t *testing.T, archive string) string {
	t.Helper()
	image, err := tarball.ImageFromPath(archive, nil)
	if err != nil {
		t.Fatal(err)
	}
	files := mutate.Extract(image)
	defer files.Close()
	names := "\n"
	for entries := tar.NewReader(files); ; {
		entry, err := entries.Next()
		if errors.Is(err, io.EOF) {
			return names
		}
		if err != nil {
			t.Fatal(err)
		}
		names += entry.Name + "\n"
	}
}
