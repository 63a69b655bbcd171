import com.pixelmed.validate.DicomSRValidator;

/** Print what PixelMed's validator says of each file, behind the file's name. Compiling its rules takes far longer than a report. */
class ValidateReports {
    public static void main(String[] files) throws Exception {
        DicomSRValidator validator = new DicomSRValidator();
        for (String file : files) {
            for (String line : validator.validate(file).split("\n")) {
                System.out.println(file + "\t" + line);
            }
        }
    }
}
