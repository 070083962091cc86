"""Predictions and tables from csv files, and every mistake in them in one line."""

import json

import numpy as np
import pytest
from scipy.special import expit, logit

from gigamorph import DataError
from gigamorph.engine.evaluate.read import read_cases, read_marks, write_cases


def write(path, text):
    path.write_text(text.replace(" ", ""))
    return path


@pytest.fixture
def predictions(tmp_path):
    return write(
        tmp_path / "predictions.csv",
        f"""image_path,patient_id,laterality,view,label,p_0,p_1
        {tmp_path}/a.png,p1,L,CC,0,0.9,0.1
        {tmp_path}/b.png,p1,L,MLO,1,0.4,0.6
        {tmp_path}/c.png,p2,R,CC,,0.5,0.5
        """,
    )


def test_two_classes_are_the_second_against_the_first(predictions):
    cases = read_cases(predictions)
    assert (cases.kind, cases.outputs, cases.probable) == ("binary", ("1",), True)
    np.testing.assert_array_equal(cases.truth[:, 0], [0, 1, np.nan])
    np.testing.assert_allclose(cases.scores[:, 0], logit([0.1, 0.6, 0.5]))
    assert cases.patients == ("p1", "p1", "p2") and cases.sides == ("L", "L", "R")
    assert set(cases.columns) == {"view", "label", "laterality"}


def test_log_odds_count_and_not_the_rounded_probabilities(tmp_path):
    path = write(
        tmp_path / "p.csv",
        "image_path,label,p_benign,p_malignant,log_odds_benign,log_odds_malignant\n"
        "a,benign,0,1,-50.25,50.25\nb,malignant,0,1,-60,60\n",
    )
    assert read_cases(path).scores[:, 0].tolist() == [50.25, 60] and read_cases(path).outputs == ("malignant",)


def test_the_table_gives_labels_and_columns(predictions, tmp_path):
    table = write(
        tmp_path / "t.csv",
        """image_path,label,patient_id,density,split
        c.png,1,q,B,test
        b.png,0,q,C,test
        a.png,0,q,D,test
        """,
    )
    cases = read_cases(predictions, table=table)
    assert cases.truth[:, 0].tolist() == [0, 1, 1]  # what the predictions have stays
    assert cases.columns["density"] == ("D", "C", "B") and cases.patients == ("q", "q", "q")  # the table's patients
    write(tmp_path / "t.csv", "image_path,label\na.png,1\nb.png,0\n")
    with pytest.raises(DataError, match=r"line 4: .*c\.png is not in .*t\.csv"):
        read_cases(predictions, table=table)
    predictions.write_text(predictions.read_text().replace(f"{tmp_path}/", "images/"))
    with pytest.raises(
        DataError, match=r"images/a\.png is not in .*; the file does not exist: .* folder where gigamorph predict ran"
    ):
        read_cases(predictions, table=table)


def test_labels_of_a_column_with_empty_cells_have_points(tmp_path):
    """As pandas writes them, and as gigamorph train takes them."""
    path = write(tmp_path / "p.csv", "image_path,label,p_0,p_1\na,1.0,0.1,0.9\nb,,0.5,0.5\nc,0.0,0.6,0.4\n")
    np.testing.assert_array_equal(read_cases(path).truth[:, 0], [1, np.nan, 0])
    path = write(tmp_path / "p.csv", "image_path,label,p_0,p_1,p_2.0\na,2.0,0.1,0.9,0\nb,1.0,0.5,0.5,0\n")
    assert read_cases(path).labels.tolist() == [2, 1]


def test_a_patient_of_two_splits_is_an_error_in_tables_without_images_too(tmp_path):
    path = write(tmp_path / "exams.csv", "exam,patient_id,split,label,p_x\ne1,p,train,0,0.1\ne2,p,test,1,0.9\n")
    with pytest.raises(DataError, match="patient p is in train and test"):
        read_cases(path, split="test")


def test_columns_have_the_names_that_tables_of_training_may_give_them(tmp_path):
    """The table that was trained on and predicted from is the one that is joined."""
    lines = "{}\n{}a.png,p,e1,LEFT,1,x\n{}b.png,p,e2,right,0,y\n"
    header = "Dicom_Path,Patient_ID,study_id,Laterality,Label,View"
    table = write(tmp_path / "t.csv", lines.format(header, "", ""))
    write(tmp_path / "p.csv", f"image_path,p_x\n{tmp_path}/a.png,0.1\n{tmp_path}/b.png,0.2\n")
    cases = read_cases(tmp_path / "p.csv", table=table)
    assert (cases.patients, cases.exams, cases.sides) == (("p", "p"), ("e1", "e2"), ("L", "R"))
    assert cases.truth[:, 0].tolist() == [1, 0] and cases.columns["View"] == cases.columns["view"] == ("x", "y")
    write(tmp_path / "breasts.csv", "breast,patient_id,exam_id,laterality,label,p_x\nb,p,e1,L,1,0.3\n")
    assert read_cases(tmp_path / "breasts.csv", table=table).columns["view"] == ("x",)
    own = write(tmp_path / "own.csv", "Patient_ID,study_id,Label,score\np,e1,1,0.5\np,e2,0,0.4\n")
    assert read_cases(own, score="score", label="Label").exams == ("e1", "e2")


def test_frames_have_their_own_labels(tmp_path):
    path = write(tmp_path / "p.csv", f"image_path,frame,p_x\n{tmp_path}/a.dcm,0,0.1\n{tmp_path}/a.dcm,1,0.9\n")
    table = write(tmp_path / "t.csv", "image_path,frame,patient_id,label\na.dcm,1,q,0\na.dcm,0,q,1\n")
    assert read_cases(path, table=table).truth[:, 0].tolist() == [1, 0]
    write(tmp_path / "t.csv", "image_path,frame,patient_id,label\na.dcm,1,q,0\n")
    with pytest.raises(DataError, match=r"line 2: .*a\.dcm, frame '0' is not in"):
        read_cases(path, table=table)


def test_an_image_that_the_table_has_twice_has_one_label(tmp_path):
    """The last one was taken."""
    path = write(tmp_path / "p.csv", f"image_path,p_x\n{tmp_path}/a.png,0.1\n")
    table = write(tmp_path / "t.csv", "image_path,patient_id,density,label\na.png,q,A,1\na.png,q,B,0\n")
    with pytest.raises(DataError, match=r"t\.csv: .*a\.png occurs 2 times, with label 0 and 1; keep one"):
        read_cases(path, table=table)
    write(tmp_path / "t.csv", "image_path,patient_id,density,label\na.png,q,A,1\na.png,q,B,1\na.png,q,B,\n")
    cases = read_cases(path, table=table)
    assert cases.truth[0, 0] == 1 and cases.columns["density"] == ("A+B",)


def test_splits(predictions, tmp_path):
    lines = "image_path,split,patient_id\na.png,Training,{}\nb.png,test,p1\nc.png,test,p2\n"
    (tmp_path / "p.csv").write_text(predictions.read_text().replace("a.png,p1", "a.png,"))
    table = write(tmp_path / "t.csv", lines.format("p0"))
    assert read_cases(tmp_path / "p.csv", table=table, split="test").names == (f"{tmp_path}/b.png", f"{tmp_path}/c.png")
    assert len(read_cases(tmp_path / "p.csv", table=table, split="train,test")) == 3
    assert len(read_cases(tmp_path / "p.csv", table=table, split="all")) == 2
    with pytest.raises(DataError, match=r"several splits \(test, train\); choose one, such as --split test"):
        read_cases(tmp_path / "p.csv", table=table)
    with pytest.raises(DataError, match="no rows of split val"):
        read_cases(tmp_path / "p.csv", table=table, split="val")
    with pytest.raises(DataError, match="has no column split"):
        read_cases(predictions, split="test")
    write(tmp_path / "t.csv", lines.format("p1"))
    with pytest.raises(DataError, match="patient p1 is in train and test"):
        read_cases(predictions, table=table, split="test")


def test_any_columns_of_label_and_score(tmp_path):
    path = write(tmp_path / "x.csv", "id,cancer,prob,rank\n1,0,0.2,7\n2,1,0.9,30\n")
    cases = read_cases(path, label="cancer", score="prob")
    np.testing.assert_allclose(expit(cases.scores[:, 0]), [0.2, 0.9])
    assert (cases.outputs, cases.probable) == (("cancer",), True)
    ranked = read_cases(path, label="cancer", score="rank")
    assert ranked.scores[:, 0].tolist() == [7, 30] and not ranked.probable


def test_several_labels(tmp_path):
    path = write(tmp_path / "x.csv", "image_path,label_mass,label_calc,p_mass,p_calc\na,1,,0.5,0.1\nb,0,1,0.3,0.2\n")
    cases = read_cases(path)
    assert (cases.kind, cases.outputs) == ("labels", ("mass", "calc"))
    np.testing.assert_array_equal(cases.truth, [[1, np.nan], [0, 1]])


@pytest.mark.parametrize("level", ["image", "breast", "exam"])
def test_written_cases_are_read_back_to_the_last_digit(predictions, tmp_path, level):
    cases = read_cases(predictions).at(level)
    back = read_cases(write_cases(tmp_path / "out.csv", cases))
    for name in ("names", "outputs", "patients", "sides", "level"):
        assert getattr(back, name) == getattr(cases, name)
    np.testing.assert_array_equal(back.scores, cases.scores)
    np.testing.assert_array_equal(back.truth, cases.truth)


def test_written_ranks_and_labels_are_read_back(tmp_path):
    path = write(tmp_path / "x.csv", "image_path,label,score_a\nu,1,7\nv,0,30\n")
    ranked = read_cases(write_cases(tmp_path / "y.csv", read_cases(path)))
    assert ranked.scores[:, 0].tolist() == [7, 30] and not ranked.probable
    path = write(tmp_path / "z.csv", "image_path,label_m,label_c,p_m,p_c\na,1,,0.5,0.1\nb,0,1,0.3,0.2\n")
    labels = read_cases(write_cases(tmp_path / "w.csv", read_cases(path)))
    np.testing.assert_array_equal(labels.truth, [[1, np.nan], [0, 1]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_path,label\na,1\n", "has no column log_odds_NAME, p_NAME or score_NAME, only image_path, label"),
        ("image_path,p_0,p_1\na,1,0\n", "column label is missing"),
        ("image_path,label,p_0,p_1\na,1,nan,0.5\n", r"line 2: p_0 is not a number \(NaN\)"),
        ("image_path,label,p_0,p_1\na,1,0.5,x\n", "line 2: p_1 'x' is not a number$"),
        ('image_path,label,p_0,p_1\na,1,"0,5",0.5\n', "line 2: p_0 '0,5' is not a number; write 0.5"),
        ("image_path,label,p_0,p_1\na,1,-0.5,1.5\n", "must be probabilities between 0 and 1"),
        ("image_path,label,p_0,p_1\na,2,0.5,0.5\n", "line 2: label '2' must be one of 0, 1"),
        ("image_path,label,p_1\na,2,0.5\n", "line 2: label '2' must be 1, 0 or empty"),
        ("image_path,label,p_1\na,benign,0.5\n", "line 2: label 'benign' must be 1, .*named classes, add a column"),
        ("image_path,label,p_1\na,nan,0.5\n", "line 2: label 'nan' must be 1, 0 or empty"),
        ("image_path,label,p_0,p_1\n", "holds no predictions"),
    ],
)
def test_mistakes_are_one_line(tmp_path, text, message):
    path = write(tmp_path / "p.csv", text)
    with pytest.raises(DataError, match=message) as error:
        read_cases(path)
    assert "\n" not in str(error.value) and "p.csv" in str(error.value)


def test_marks_and_lesions(predictions, tmp_path):
    marks = write(
        tmp_path / "marks.csv",
        f"image_path,row,column,score\n{tmp_path}/a.png,5,6,0.9\n{tmp_path}/z.png,1,1,1\n{tmp_path}/a.png,50,60,0.1\n",
    )
    findings = json.dumps([{"box": [0, 10, 0, 10]}, {"outline": [[20, 20], [29.5, 30], [25, 40]]}, {"kind": "mass"}])
    quoted = findings.replace('"', '""')
    table = tmp_path / "t.csv"
    table.write_text(f'image_path,findings\na.png,"{quoted}"\nb.png,\nc.png,\n')
    found, without = read_marks(marks, table, read_cases(predictions))
    assert without == 1 and [len(one.boxes) for one in found] == [2, 0, 0]
    assert found[0].boxes.tolist() == [[0, 10, 0, 10], [20, 30, 20, 41]]
    assert found[0].places.tolist() == [[5, 6], [50, 60]] and found[0].scores.tolist() == [0.9, 0.1]
    assert found[0].patient == found[1].patient == "patient p1"
    boxes = write(tmp_path / "b.csv", f"image_path,top,bottom,left,right,score\n{tmp_path}/a.png,0,10,20,40,1\n")
    assert read_marks(boxes, table, read_cases(predictions))[0][0].places.tolist() == [[5, 30]]
    with pytest.raises(DataError, match="column row, column is missing"):
        read_marks(write(tmp_path / "x.csv", "image_path,score\na,1\n"), table, read_cases(predictions))
    others = write(tmp_path / "others.csv", "image_path,row,column,score\nother/a.png,5,6,0.9\n")
    with pytest.raises(
        DataError, match=r"none of its 1 marks belongs to an image of .*t\.csv \(such as other/a\.png\)"
    ):
        read_marks(others, table, read_cases(predictions))  # else it would find no lesion
    none = write(tmp_path / "none.csv", "image_path,row,column,score\n")
    assert [len(one.scores) for one in read_marks(none, table, read_cases(predictions))[0]] == [0, 0, 0]
    twice = read_cases(predictions).where([0, 0, 1])
    with pytest.raises(DataError, match=r"a\.png: an image or frame occurs twice"):
        read_marks(marks, table, twice)
    table.write_text("image_path,findings\na.png,\n")
    with pytest.raises(DataError, match=r"has no row of .*b\.png"):
        read_marks(marks, table, read_cases(predictions))


def test_exams_take_what_all_their_images_share(tmp_path):
    write(
        tmp_path / "exams.csv",
        """exam,patient_id,exam_id,laterality,label,log_odds_0,log_odds_1
        p,p,,L+R,1,-1,1
        q,q,,L,0,2,-2
        """,
    )
    table = write(
        tmp_path / "t.csv",
        """image_path,label,patient_id,density,scanner
        a.png,0,p,B,x
        b.png,1,p,B,y
        c.png,1,q,C,x
        """,
    )
    cases = read_cases(tmp_path / "exams.csv", table=table)
    assert cases.level == "exam" and cases.truth[:, 0].tolist() == [1, 0]  # their own, not the images'
    assert cases.columns["density"] == ("B", "C") and cases.columns["scanner"] == ("x+y", "x")
    write(tmp_path / "t.csv", "image_path,label,patient_id\na.png,0,p\n")
    with pytest.raises(DataError, match=r"line 3: patient_id 'q', exam_id '' is not in .*t\.csv"):
        read_cases(tmp_path / "exams.csv", table=table)
