package cluster

import (
	"archive/tar"
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"
)

// Image is a container image in a file of the form that `docker save` writes. Nodes have it once it is imported; pods
// use it by Ref with imagePullPolicy Never.
type Image struct {
	Name    string // without the tag: local/nmi
	Tag     string // says which content it is
	Archive string
}

// Ref is the name that goes into a pod.
func (i Image) Ref() string { return i.Name + ":" + i.Tag }

// imageSpec says what goes into an image: a root file system, if any, and a static program.
type imageSpec struct {
	name    string
	tag     string // empty: made from the content
	program string // file
	target  string // its path in the image
	rootfs  string // folder; may be empty
	args    []string
}

// pack writes the image into the cache unless the same content is there already.
func (s imageSpec) pack(cache string) (Image, error) {
	dir := filepath.Join(cache, "images")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return Image{}, err
	}
	layer, err := os.CreateTemp(dir, "layer-")
	if err != nil {
		return Image{}, err
	}
	defer os.Remove(layer.Name())
	defer layer.Close()
	hash := sha256.New()
	if err := s.writeLayer(io.MultiWriter(layer, hash)); err != nil {
		return Image{}, fmt.Errorf("packing image %s: %w", s.name, err)
	}
	diffID := "sha256:" + hex.EncodeToString(hash.Sum(nil))
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux", "created": "1970-01-01T00:00:00Z",
		"config": map[string]any{
			"Entrypoint": append([]string{s.target}, s.args...),
			"Env":        []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
		},
		"rootfs":  map[string]any{"type": "layers", "diff_ids": []string{diffID}},
		"history": []any{map[string]any{"created": "1970-01-01T00:00:00Z", "created_by": "e2e/cluster"}},
	})
	if err != nil {
		return Image{}, err
	}
	sum := sha256.Sum256(config)
	id := hex.EncodeToString(sum[:])
	image := Image{Name: s.name, Tag: s.tag}
	if image.Tag == "" {
		image.Tag = id[:12]
	}
	image.Archive = filepath.Join(dir, filepath.Base(s.name)+"-"+image.Tag+"-"+id[:12]+".tar")
	if _, err := os.Stat(image.Archive); err == nil {
		return image, nil
	}
	if err := writeArchive(image, id, config, layer); err != nil {
		return Image{}, fmt.Errorf("packing image %s: %w", s.name, err)
	}
	return image, removeOldArchives(dir, filepath.Base(s.name))
}

// removeOldArchives keeps the newest few archives of a name: each change of the product makes another one.
func removeOldArchives(dir, name string) error {
	const keep = 4
	archives, err := filepath.Glob(filepath.Join(dir, name+"-*.tar"))
	if err != nil {
		return err
	}
	age := func(path string) int64 {
		info, err := os.Stat(path)
		if err != nil {
			return 0
		}
		return -info.ModTime().UnixNano()
	}
	slices.SortFunc(archives, func(a, b string) int { return cmp.Compare(age(a), age(b)) })
	for i, archive := range archives {
		if i >= keep {
			if err := os.Remove(archive); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s imageSpec) writeLayer(w io.Writer) error {
	out := tar.NewWriter(w)
	if s.rootfs == "" {
		for _, d := range []struct {
			name string
			mode int64
		}{{"etc/", 0o755}, {"tmp/", 0o1777}} {
			if err := out.WriteHeader(&tar.Header{Name: d.name, Mode: d.mode, Typeflag: tar.TypeDir, ModTime: time.Unix(0, 0)}); err != nil {
				return err
			}
		}
		passwd := []byte("root:x:0:0:root:/:/none\nnobody:x:65534:65534:nobody:/:/none\n")
		if err := addFile(out, "etc/passwd", 0o644, int64(len(passwd)), bytes.NewReader(passwd)); err != nil {
			return err
		}
	} else if err := addTree(out, s.rootfs); err != nil {
		return err
	}
	program, err := os.Open(s.program)
	if err != nil {
		return err
	}
	defer program.Close()
	info, err := program.Stat()
	if err != nil {
		return err
	}
	if err := addFile(out, s.target[1:], 0o755, info.Size(), program); err != nil {
		return err
	}
	return out.Close()
}

// addTree adds a folder's contents as root's. Times are left out, so that equal content makes an equal image.
func addTree(out *tar.Writer, root string) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		link := ""
		if info.Mode().Type() == fs.ModeSymlink {
			if link, err = os.Readlink(path); err != nil {
				return err
			}
		}
		header, err := tar.FileInfoHeader(info, link)
		if err != nil {
			return err
		}
		if header.Name, err = filepath.Rel(root, path); err != nil {
			return err
		}
		if d.IsDir() {
			header.Name += "/"
		}
		header.Uid, header.Gid, header.Uname, header.Gname = 0, 0, "", ""
		header.ModTime, header.AccessTime, header.ChangeTime = time.Unix(0, 0), time.Time{}, time.Time{}
		header.Format = tar.FormatUnknown
		if err := out.WriteHeader(header); err != nil || !info.Mode().IsRegular() {
			return err
		}
		file, err := os.Open(path)
		if err != nil {
			return err
		}
		defer file.Close()
		_, err = io.Copy(out, file)
		return err
	})
}

func addFile(out *tar.Writer, name string, mode, size int64, content io.Reader) error {
	if err := out.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: size, Typeflag: tar.TypeReg, ModTime: time.Unix(0, 0)}); err != nil {
		return err
	}
	_, err := io.Copy(out, content)
	return err
}

func writeArchive(image Image, id string, config []byte, layer *os.File) error {
	manifest, err := json.Marshal([]any{map[string]any{
		"Config": id + ".json", "RepoTags": []string{image.Ref()}, "Layers": []string{"layer.tar"},
	}})
	if err != nil {
		return err
	}
	size, err := layer.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if _, err := layer.Seek(0, io.SeekStart); err != nil {
		return err
	}
	file, err := os.CreateTemp(filepath.Dir(image.Archive), "archive-")
	if err != nil {
		return err
	}
	defer os.Remove(file.Name())
	defer file.Close()
	out := tar.NewWriter(file)
	err = errors.Join(
		addFile(out, id+".json", 0o644, int64(len(config)), bytes.NewReader(config)),
		addFile(out, "layer.tar", 0o644, size, layer),
		addFile(out, "manifest.json", 0o644, int64(len(manifest)), bytes.NewReader(manifest)),
		out.Close())
	if err != nil {
		return err
	}
	return os.Rename(file.Name(), image.Archive)
}
